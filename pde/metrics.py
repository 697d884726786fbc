"""Torchmetrics classes over ``thalweg.pde.errors``: they keep one number per sample and quantity, no fields.

A median needs every sample's error, so states are lists that are concatenated across processes. Fields may be
normalised (as Poseidon reports) or physical; a metric does not know the difference.

Shapes: B samples, C channels, G groups, F frames, H/W space.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from thalweg.pde import errors
from thalweg.pde.problem import ProblemSpec

Groups = Sequence[Sequence[str]]


class SampleErrors(Metric):
    """Base of the metrics below: collects (B, G) errors and summarises them over samples.

    Args:
        groups: Channel names by physical quantity; all channels together if not given.
        scored: Groups that the ``scored_...`` averages run over; all if not given.
    """

    higher_is_better = False
    full_state_update = False
    is_differentiable = False
    group_dim = 1
    errors: list[Tensor]

    def __init__(self, groups: Groups | None = None, scored: Groups | None = None) -> None:
        super().__init__()
        self.groups = None if groups is None else [tuple(group) for group in groups]
        self.scored = None if scored is None else [tuple(group) for group in scored]
        self.edges = None if groups is None else errors.group_edges(groups)
        self.add_state("errors", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def per_sample(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Errors of shape (B, G)."""

    def update(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> None:
        """Add the errors of a batch of fields, both (B, C, H, W)."""
        self.errors.append(self.per_sample(pred_BCHW, target_BCHW))

    def samples(self) -> Tensor:
        """Errors of all samples seen so far, shape (N, G)."""
        return dim_zero_cat(self.errors)

    @property
    def names(self) -> list[tuple[str, ...]]:
        """Groups of the collected errors; numbered if they have no names."""
        if self.groups is not None:
            return self.groups
        return [(f"channel{index}",) for index in range(self.samples().shape[self.group_dim])]

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """Statistics over samples, by name."""


class NamedErrors(SampleErrors):
    """One kind of error, summarised per group."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Word that names this error in the report, e.g. ``relative_l1``."""

    def compute(self) -> dict[str, Tensor]:
        """Statistics over samples, named as in :func:`thalweg.pde.errors.summarise`."""
        return errors.summarise(self.samples(), self.names, self.kind, self.scored)


class RelativeLp(NamedErrors):
    """Relative L1 or L2 error in percent per group; the paper's number is the median with p = 1.

    Example:
        >>> import torch
        >>> metric = RelativeLp(groups=[["u"]], p=1)
        >>> metric.update(torch.full((1, 1, 4, 4), 1.5), torch.ones(1, 1, 4, 4))
        >>> metric.compute()["median_relative_l1_error"].item()
        50.0
    """

    def __init__(
        self,
        groups: Groups | None = None,
        p: int = 1,
        scored: Groups | None = None,
        zero_norm: float = errors.ZERO_NORM,
    ) -> None:
        super().__init__(groups, scored)
        self.p = p
        self.zero_norm = zero_norm

    @property
    def kind(self) -> str:
        """``relative_l1`` or ``relative_l2``."""
        return f"relative_l{self.p}"

    def per_sample(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Relative errors in percent, shape (B, G)."""
        return errors.relative_lp_error(
            pred_BCHW, target_BCHW, edges=self.edges, p=self.p, zero_norm=self.zero_norm
        )

    @classmethod
    def for_problem(cls, spec: ProblemSpec, p: int = 1) -> RelativeLp:
        """Metric with the groups of a problem, scored as in the paper."""
        return cls(groups=spec.groups, p=p, scored=spec.scored_groups)


class LpError(NamedErrors):
    """Absolute L1 or L2 error per group, summed over channels and pixels."""

    def __init__(self, groups: Groups | None = None, p: int = 1, scored: Groups | None = None) -> None:
        super().__init__(groups, scored)
        self.p = p

    @property
    def kind(self) -> str:
        """``l1`` or ``l2``."""
        return f"l{self.p}"

    def per_sample(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Absolute errors, shape (B, G)."""
        return errors.lp_error(pred_BCHW, target_BCHW, edges=self.edges, p=self.p)


class RMSE(NamedErrors):
    """Root mean square error per channel, in the units of the fields."""

    def __init__(self, channels: Sequence[str] | None = None, scored: Sequence[str] | None = None) -> None:
        super().__init__(*_single(channels, scored))

    @property
    def kind(self) -> str:
        """``rmse``."""
        return "rmse"

    def per_sample(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Root mean square errors, shape (B, C)."""
        return errors.rmse(pred_BCHW, target_BCHW)


class VRMSE(NamedErrors):
    """Root mean square error over the target's spatial standard deviation; the mean field scores 1."""

    def __init__(
        self,
        channels: Sequence[str] | None = None,
        scored: Sequence[str] | None = None,
        eps: float = 1e-7,
    ) -> None:
        super().__init__(*_single(channels, scored))
        self.eps = eps

    @property
    def kind(self) -> str:
        """``vrmse``."""
        return "vrmse"

    def per_sample(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Variance-scaled errors, shape (B, C)."""
        return errors.vrmse(pred_BCHW, target_BCHW, eps=self.eps)


class SpectralError(SampleErrors):
    """Relative L2 error in percent of the low, middle and high wave numbers, per group."""

    BAND_NAMES = ("low_band", "middle_band", "high_band")

    def __init__(
        self,
        groups: Groups | None = None,
        bands: Sequence[int] = errors.BANDS,
        scored: Groups | None = None,
    ) -> None:
        super().__init__(groups, scored)
        if len(bands) != len(self.BAND_NAMES) or list(bands) != sorted(set(bands)) or bands[0] != 0:
            raise ValueError(f"bands must be three increasing wave numbers starting at 0, not {list(bands)}")
        self.bands = tuple(bands)

    def per_sample(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
        """Errors of shape (B, G, N)."""
        return errors.band_error(pred_BCHW, target_BCHW, edges=self.edges, bands=self.bands)

    def compute(self) -> dict[str, Tensor]:
        """Statistics per band; ``kind`` is the band's name."""
        report: dict[str, Tensor] = {}
        for errors_NG, name in zip(self.samples().unbind(-1), self.BAND_NAMES, strict=True):
            report |= errors.summarise(errors_NG, self.names, name, self.scored)
        return report


class HorizonError(SampleErrors):
    """Relative error of every frame of a prediction, so that its growth in time can be seen."""

    group_dim = 2

    def __init__(self, groups: Groups | None = None, p: int = 1, scored: Groups | None = None) -> None:
        super().__init__(groups, scored)
        self.p = p

    def update(self, pred_BFCHW: Tensor, target_BFCHW: Tensor) -> None:
        """Add a batch of trajectories, both (B, F, C, H, W)."""
        self.errors.append(self.per_sample(pred_BFCHW, target_BFCHW))

    def per_sample(self, pred_BFCHW: Tensor, target_BFCHW: Tensor) -> Tensor:
        """Relative errors in percent, shape (B, F, G)."""
        flat = errors.relative_lp_error(
            pred_BFCHW.flatten(0, 1), target_BFCHW.flatten(0, 1), edges=self.edges, p=self.p
        )
        return flat.unflatten(0, pred_BFCHW.shape[:2])

    def compute(self) -> dict[str, Tensor]:
        """``{group}/median`` and ``{group}/mean`` of shape (F,), and both over the scored groups."""
        errors_NFG = self.samples()
        middle_FG, mean_FG = errors.median(errors_NFG), errors_NFG.mean(dim=0)
        report: dict[str, Tensor] = {}
        for index, group in enumerate(self.names):
            report["".join(group) + "/median"] = middle_FG[:, index]
            report["".join(group) + "/mean"] = mean_FG[:, index]
        kept = [i for i, g in enumerate(self.names) if self.scored is None or g in self.scored]
        if kept:
            report["scored/median"] = middle_FG[:, kept].mean(dim=1)
            report["scored/mean"] = mean_FG[:, kept].mean(dim=1)
        return report


class MeanSpectra(Metric):
    """Power spectra of prediction, target and error, averaged over samples."""

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, num_channels: int, height: int, width: int) -> None:
        super().__init__()
        size = int(errors.shells(height, width).max()) + 1
        self.add_state("sums", torch.zeros(3, num_channels, size), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, pred_BCHW: Tensor, target_BCHW: Tensor) -> None:
        """Add a batch of fields, both (B, C, H, W)."""
        fields = (pred_BCHW, target_BCHW, pred_BCHW - target_BCHW)
        self.sums += torch.stack([errors.power_spectrum(field).sum(0) for field in fields]).to(self.sums)
        self.count += len(pred_BCHW)

    def compute(self) -> dict[str, Tensor]:
        """``prediction``, ``truth`` and ``error``, each (C, K)."""
        return dict(zip(("prediction", "truth", "error"), self.sums / self.count, strict=True))


def _single(*names: Sequence[str] | None) -> Iterator[Groups | None]:
    """One group per channel, for each list of channels."""
    for channels in names:
        yield None if channels is None else [(name,) for name in channels]
