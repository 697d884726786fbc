"""The pictures of an evaluation: typical samples, spectra, growth of the error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from thalweg.pde import plots
from thalweg.pde.evaluation import Evaluator
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
    names = [channel.name for channel in evaluator.spec.outputs]
    spectra = {key: value.cpu().numpy() for key, value in scores.spectra.compute().items()}
    figure = plots.spectra(spectra["truth"], spectra["prediction"], spectra["error"], names)
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


def _sample(folder: Path, name: str, label: str, evaluator: Evaluator, sample: int) -> list[Path]:
    """Panels of one sample: all channels at the final time, and the first scored channel over time."""
    spec, protocol = evaluator.spec, evaluator.protocol
    prediction, truth = (
        evaluator.normalizer.denormalize_outputs(x)[0].cpu().numpy() for x in evaluator.predict([sample])
    )
    times = evaluator.reader.times
    title = f"{spec.name}, {label} sample ({sample})"
    if not spec.steady:
        title += f", t = {times[protocol.final] - times[protocol.initial]:.3g}"
    channels, units = [c.name for c in spec.outputs], [c.units for c in spec.outputs]
    figure = plots.field_panels(truth[-1], prediction[-1], channels, units, title)
    files = [plots.save(figure, folder / f"sample_{name}.png")]
    if len(protocol.frames) > 1 and label == "median":
        scored = [name for group in spec.scored_groups for name in group]
        channel = channels.index(scored[0])
        shown = np.unique(np.linspace(0, len(protocol.frames) - 1, 7).round().astype(int))
        offsets = [times[protocol.frames[i]] - times[protocol.initial] for i in shown]
        figure = plots.rollout_panels(
            truth[shown, channel], prediction[shown, channel], offsets, channels[channel], title
        )
        files.append(plots.save(figure, folder / f"trajectory_{name}.png"))
    return files
