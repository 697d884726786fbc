"""``thalweg evaluate``: checkpoint and data set in; errors, predictions and pictures out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from thalweg.apps.networks import LoadedNetwork
    from thalweg.pde.data.normalize import Mode
    from thalweg.pde.data.trajectories import TrajectoryReader
    from thalweg.pde.evaluation import Evaluator
    from thalweg.pde.problem import ProblemSpec


def evaluate(
    *,
    ckpt: str,
    dataset: str,
    path: str = "data",
    out: str = "runs/eval",
    split: Literal["train", "val", "test"] = "test",
    mode: Literal["direct", "autoregressive", "accumulation", "resolution"] = "direct",
    initial_time: int | None = None,
    final_time: int | None = None,
    ar_steps: int | None = None,
    ar_pattern: str | None = None,
    static: Literal["truth", "predicted"] = "truth",
    horizon: bool = True,
    resolutions: str = "32,64,128",
    limit: int | None = None,
    normalization: Literal["auto", "published", "file", "compute"] | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
    trajectories: int | None = None,
    save_predictions: bool = False,
    plots: bool = True,
    batch_size: int = 16,
    device: str = "auto",
) -> None:
    """Score a network on a data set: metrics.json, pictures, and predictions on request.

    Times are snapshot indices. The headline is the paper's number: the median relative L1 error in percent at
    the final time, averaged over the evolving quantities, in normalised units.

    Args:
        ckpt: Lightning checkpoint, run folder, exported folder, or hf://org/name.
        dataset: Name of the data set, see `thalweg data list`.
        path: File of the data set, or a folder that holds it.
        out: Folder for the results.
        split: Part of the data set.
        mode: direct predicts each snapshot from the first; autoregressive feeds predictions back and scores
            the last; accumulation scores every state on the way; resolution repeats direct on coarser grids.
        initial_time: Snapshot to start from, 0 by default.
        final_time: Last snapshot; by default that of the paper (14 for most sets, t = 0.7).
        ar_steps: Number of equal steps of a rollout.
        ar_pattern: Lengths of a rollout's steps in snapshots, such as 2,2,10; by default the stride of the
            training pairs.
        static: What a rollout feeds back in channels that do not evolve: the truth, or what was predicted as
            in the reference evaluation.
        horizon: Let direct mode score all snapshots on the way as well, not only the last.
        resolutions: Grids of mode resolution.
        limit: Use only this many trajectories, the first of the split.
        normalization: Constants of the network's units; by default those it was trained with.
        weights: Averaged or raw weights of a Lightning checkpoint; auto takes averaged ones if there are any.
        trajectories: Number of trajectories the network was trained on, where the checkpoint does not say;
            `thalweg gains` needs it.
        save_predictions: Write predictions.nc with prediction and truth in physical units.
        plots: Draw the best, median and worst sample, spectra and the error over time.
        batch_size: Trajectories at a time.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.

    Raises:
        ValueError: If checkpoint, data and options do not fit together.
    """
    from thalweg.apps.networks import load_network
    from thalweg.apps.results import write_json
    from thalweg.pde.data import catalog
    from thalweg.pde.poseidon.matching import check_network

    spec = catalog.get(dataset)
    times = {"initial": initial_time, "final": final_time, "steps": _steps(ar_steps, ar_pattern)}
    sizes = _numbers(resolutions, "resolutions") if mode == "resolution" else [None]
    loaded = load_network(ckpt, weights)
    check_network(loaded.network.config, [spec])
    results: dict[str, Any] = {}
    for size in sizes:
        evaluator = _evaluator(
            loaded,
            spec,
            Path(path),
            size,
            normalization,
            {**times, "mode": "direct" if size else mode, "static": static, "horizon": horizon},
            {"device": _device(device), "batch_size": batch_size},
        )
        samples = _samples(evaluator.reader, split, limit)
        suffix = f"_{size}" if size else ""
        results[str(size)] = score(evaluator, samples, Path(out), suffix, save_predictions, plots, loaded)
    report = {
        **describe(evaluator, samples, loaded),
        "training": _training(loaded, evaluator.reader, trajectories),
        **({"resolutions": results} if mode == "resolution" else results["None"]),
    }
    report["protocol"] |= {"mode": mode, "split": split}
    write_json(report, Path(out) / "metrics.json")
    print_summary(results, evaluator, mode)
    print(f"written to {out}")


def _evaluator(
    loaded: LoadedNetwork,
    spec: ProblemSpec,
    path: Path,
    resolution: int | None,
    normalization: Mode | None,
    times: dict[str, Any],
    options: dict[str, Any],
) -> Evaluator:
    """Open the data and put network, constants and protocol together."""
    from thalweg.pde.data.normalize import normalizer_for
    from thalweg.pde.data.trajectories import open_problem
    from thalweg.pde.evaluation import Evaluator, plan

    reader = open_problem(spec, path, resolution=resolution)
    constants: Mode = normalization or loaded.data_config.get("normalization") or "auto"
    normalizer = normalizer_for(spec, reader.constants, constants, reader)
    return Evaluator(loaded.network, reader, normalizer, plan(spec, reader.frames, **times), **options)


def describe(evaluator: Evaluator, samples: Sequence[int], loaded: LoadedNetwork) -> dict[str, Any]:
    """What a reader of the numbers has to know."""
    from thalweg.apps.results import provenance

    protocol = dataclasses.asdict(evaluator.protocol)
    shared = {"samples": len(samples), "dtype": "float32", "device": str(evaluator.device)}
    return {
        "dataset": evaluator.spec.name,
        "protocol": {**protocol, **shared, "grid": list(evaluator.reader.grid)},
        "model": loaded.describe(),
        "data": {
            "file": str(evaluator.reader.contents.path),
            "constants": evaluator.normalizer.as_dict(),
        },
        "provenance": provenance(),
    }


def score(
    evaluator: Evaluator,
    samples: Sequence[int],
    folder: Path,
    suffix: str,
    save_predictions: bool,
    plots: bool,
    loaded: LoadedNetwork,
) -> dict[str, Any]:
    """Run one evaluation, write its predictions and pictures, and return its numbers."""
    from thalweg.pde.predictions import PredictionFile

    reader, protocol = evaluator.reader, evaluator.protocol
    times = [float(reader.times[frame]) for frame in protocol.frames]
    with ExitStack() as stack:
        sinks = []
        if save_predictions:
            target = folder / f"predictions{suffix}.nc"
            origin = {"network": str(loaded.source), "mode": protocol.mode}
            sinks.append(
                stack.enter_context(
                    PredictionFile(target, evaluator.spec, samples, times, reader.grid, origin)
                )
            )
        scores = evaluator.run(samples, sinks)
    if plots:
        from thalweg.pde.gallery import draw

        draw(folder, suffix, evaluator, samples, scores)
    report = scores.report()
    report["horizon"] |= {"frames": list(protocol.frames), "times": times}
    report["per_sample"] = {"sample": list(samples), "relative_l1_error": scores.per_sample()}
    return report


def _steps(count: int | None, pattern: str | None) -> int | list[int] | None:
    """Steps of a rollout as the protocol takes them."""
    if count is not None and pattern is not None:
        raise ValueError("ar_steps and ar_pattern exclude each other")
    return count if pattern is None else _numbers(pattern, "ar_pattern")


def _numbers(text: str, option: str) -> list[Any]:
    """Integers written as ``32,64,128``."""
    try:
        return [int(part) for part in text.strip("[]() ").split(",")]
    except ValueError:
        raise ValueError(f"{option} takes integers separated by commas, not {text!r}") from None


def _samples(
    reader: TrajectoryReader, split: Literal["test", "val", "train"], limit: int | None
) -> list[int]:
    """Trajectories to score."""
    from thalweg.pde.data.pairs import part_range

    samples = list(part_range(reader.splits, split))[:limit]
    if not samples:
        raise ValueError(f"{reader.contents.path} has no {split} trajectories (limit {limit})")
    return samples


def _training(loaded: LoadedNetwork, reader: TrajectoryReader, trajectories: int | None) -> dict[str, Any]:
    """What is known about the training; -1, -2 and -8 are resolved where the same data set was used."""
    from thalweg.pde.data import catalog
    from thalweg.pde.data.pairs import num_train

    known = loaded.training()
    count = known.get("num_trajectories") if trajectories is None else trajectories
    names = known.get("datasets", [])
    if (
        count is not None
        and count < 0
        and names
        and {catalog.get(n).file for n in names} == {reader.spec.file}
    ):
        count = num_train(reader.splits, count)
    return {**known, "num_trajectories": count}


def _device(name: str) -> str:
    """A device that torch knows."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def print_summary(results: dict[str, Any], evaluator: Evaluator, mode: str) -> None:
    """Print medians per quantity, one row per resolution."""
    from rich.console import Console
    from rich.table import Table

    spec = evaluator.spec
    groups = ["".join(group) for group in spec.scored_groups]
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{spec.name}, {mode}: median relative L1 error [%] and VRMSE")
    table = Table(box=None, header_style="bold")
    for heading in ("grid" if mode == "resolution" else "snapshot", *groups, "mean", "VRMSE"):
        table.add_column(heading, justify="right")
    for size, result in results.items():
        errors = result["metrics"]["normalised"]
        single = len(spec.outputs) == 1
        medians = [errors[f"{'' if single else group + '/'}median_relative_l1_error"] for group in groups]
        values = (*medians, errors["scored_median_relative_l1_error"])
        row = size if mode == "resolution" else str(evaluator.protocol.final)
        vrmse = f"{errors['scored_median_vrmse_error']:.4g}"
        table.add_row(row, *(f"{value:.3f}" for value in values), vrmse)
    console.print(table)
