"""The pictures of an evaluation: typical samples, spectra, growth of the error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thalweg.pde import plots
from thalweg.pde.evaluation import Evaluator
from thalweg.pde.problem import ProblemSpec
from thalweg.pde.scores import Scores


def draw(
    folder: Path, suffix: str, evaluator: Evaluator, samples: Sequence[int], scores: Scores
) -> list[Path]:
    """Draw the best, median and worst sample, the spectra and, for several frames, the error over time.

    The three samples are predicted once more: an evaluation keeps no fields.

    Args:
        folder: Where pictures go.
        suffix: Appended to file names.
        evaluator: The evaluation.
        samples: Its samples.
        scores: Its errors.

    Returns:
        The files, as PNG.
    """
    ranking = scores.ranking()
    typical = {"best": ranking[0], "median": ranking[len(ranking) // 2], "worst": ranking[-1]}
    files = []
    for label, position in typical.items():
        files += _sample(folder, f"{label}{suffix}", label, evaluator, samples[position])
    shown = evolving(evaluator.spec)
    names = [evaluator.spec.outputs[index].name for index in shown]
    complete = min(evaluator.reader.grid) // 2 + 1  # beyond, shells of wave numbers have gaps
    spectra = {k: v.cpu().numpy()[shown, :complete] for k, v in scores.spectra.compute().items()}
    fields = (spectra["truth"], spectra["prediction"], spectra["error"])
    figure = plots.spectra(*fields, names, f"{evaluator.spec.name}, {evaluator.protocol.mode}")
    files.append(plots.save(figure, folder / f"spectra{suffix}.png"))
    frames = evaluator.protocol.frames
    if len(frames) > 1:
        report = scores.report()["horizon"]["normalised"]
        groups = ["".join(group) for group in evaluator.spec.scored_groups]
        curves = {group: report[f"{group}/median"] for group in groups}
        times = evaluator.reader.times[list(frames)] - evaluator.reader.times[evaluator.protocol.initial]
        title = f"{evaluator.spec.name}, {evaluator.protocol.mode}"
        figure = plots.error_over_time(times.tolist(), curves, title)
        files.append(plots.save(figure, folder / f"error_over_time{suffix}.png"))
    return files


def evolving(spec: ProblemSpec) -> list[int]:
    """Output channels worth a picture: those the paper scores."""
    scored = {name for group in spec.scored_groups for name in group}
    return [index for index, channel in enumerate(spec.outputs) if channel.name in scored]


def _sample(folder: Path, name: str, label: str, evaluator: Evaluator, sample: int) -> list[Path]:
    """Panels of one sample: all evolving channels at the final time, and the first one over time."""
    spec, protocol, shown = evaluator.spec, evaluator.protocol, evolving(evaluator.spec)
    prediction, truth = (
        evaluator.normalizer.denormalize_outputs(x)[0, :, shown].cpu().numpy()
        for x in evaluator.predict([sample])
    )
    times = evaluator.reader.times
    title = f"{spec.name}, {protocol.mode}, {label} sample ({sample})"
    at_end = "" if spec.steady else f", t = {times[protocol.final] - times[protocol.initial]:.3g}"
    names, units = zip(*((spec.outputs[i].name, spec.outputs[i].units) for i in shown), strict=True)
    figure = plots.field_panels(truth[-1], prediction[-1], names, units, title + at_end)
    files = [plots.save(figure, folder / f"sample_{name}.png")]
    if len(protocol.frames) > 1 and label == "median":
        columns = np.unique(np.linspace(0, len(protocol.frames) - 1, 7).round().astype(int))
        offsets = [times[protocol.frames[i]] - times[protocol.initial] for i in columns]
        figure = plots.rollout_panels(truth[columns, 0], prediction[columns, 0], offsets, names[0], title)
        files.append(plots.save(figure, folder / f"trajectory_{name}.png"))
    return files
