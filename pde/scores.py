"""The metrics of an evaluation, together: normalised and physical units, growth in time, spectra.

Shapes: B samples, F frames, C channels, G groups, H/W space, K wave numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thalweg.pde.metrics import (
    RMSE,
    VRMSE,
    HorizonError,
    LpError,
    MeanSpectra,
    RelativeLp,
    SampleErrors,
    SpectralError,
)
from thalweg.pde.problem import ProblemSpec


class Scores(nn.Module):
    """All errors of one evaluation; final-time metrics look at the last frame only.

    Args:
        spec: The problem, whose groups are scored as in the paper.
        height: Grid points along the first axis.
        width: Grid points along the second axis.
    """

    def __init__(self, spec: ProblemSpec, height: int, width: int) -> None:
        super().__init__()
        groups, scored = spec.groups, spec.scored_groups
        channels = [channel.name for channel in spec.outputs]
        scored_channels = [name for group in scored for name in group]
        self.normalised = nn.ModuleList(
            [
                *(kind(groups, p=p, scored=scored) for kind in (RelativeLp, LpError) for p in (1, 2)),
                VRMSE(channels, scored=scored_channels),
                SpectralError(groups, scored=scored),
            ]
        )
        self.physical = nn.ModuleList(
            [
                *(RelativeLp(groups, p=p, scored=scored) for p in (1, 2)),
                RMSE(channels, scored=scored_channels),
            ]
        )
        self.horizon = HorizonError(groups, scored=scored)
        self.horizon_physical = HorizonError(groups, scored=scored)
        self.spectra = MeanSpectra(len(channels), height, width)

    def update(
        self, prediction: Tensor, truth: Tensor, physical_prediction: Tensor, physical_truth: Tensor
    ) -> None:
        """Add a batch; all arguments (B, F, C, H, W)."""
        for metric in self.normalised:
            metric.update(prediction[:, -1], truth[:, -1])
        for metric in self.physical:
            metric.update(physical_prediction[:, -1], physical_truth[:, -1])
        self.horizon.update(prediction, truth)
        self.horizon_physical.update(physical_prediction, physical_truth)
        self.spectra.update(physical_prediction[:, -1], physical_truth[:, -1])

    def report(self) -> dict[str, Any]:
        """Final-time statistics and errors per frame, as plain numbers."""
        return {
            "metrics": {"normalised": _merge(self.normalised), "physical": _merge(self.physical)},
            "horizon": {
                "normalised": _plain(self.horizon.compute()),
                "physical": _plain(self.horizon_physical.compute()),
            },
        }

    def per_sample(self) -> dict[str, list[float]]:
        """Relative L1 error in percent of every sample at the final time, per group, normalised."""
        metric = self.normalised[0]
        assert isinstance(metric, SampleErrors)
        names = ["".join(group) for group in metric.names]
        return dict(zip(names, metric.samples().T.tolist(), strict=True))

    def ranking(self) -> list[int]:
        """Positions of the samples from best to worst, by the mean error over the scored groups."""
        metric = self.normalised[0]
        assert isinstance(metric, SampleErrors)
        kept = [i for i, group in enumerate(metric.names) if metric.scored is None or group in metric.scored]
        order: list[int] = torch.argsort(metric.samples()[:, kept].mean(dim=1)).tolist()
        return order


def _merge(metrics: nn.ModuleList) -> dict[str, Any]:
    """Reports of several metrics, whose names differ."""
    report: dict[str, Any] = {}
    for metric in metrics:
        report |= _plain(metric.compute())
    return report


def _plain(report: dict[str, Tensor]) -> dict[str, Any]:
    """Tensors as numbers and lists."""
    return {name: value.tolist() for name, value in report.items()}
