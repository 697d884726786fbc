"""Errors between predicted and true fields: pure functions giving one number per sample and quantity.

Shapes: B samples, C channels, G groups of channels (one physical quantity each), H/W space, K wave numbers,
N bands. Groups are consecutive channels; ``edges`` holds their boundaries, e.g. ``[0, 1, 3, 4]`` for
density, velocity and pressure. Sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

ZERO_NORM = 1e-10
"""Stands in for a label whose norm is exactly zero."""
BANDS = (0, 5, 13)
"""First wave number of the low, middle and high band, as in PDEBench (Takamoto et al. 2022)."""


def group_edges(groups: Sequence[Sequence[str]]) -> list[int]:
    """Boundaries of consecutive channel groups: ``[["rho"], ["u", "v"]]`` gives ``[0, 1, 3]``."""
    edges = [0]
    for group in groups:
        edges.append(edges[-1] + len(group))
    return edges


def lp_error(
    pred_BCHW: Tensor, target_BCHW: Tensor, *, edges: Sequence[int] | None = None, p: int = 1
) -> Tensor:
    """Absolute error (sum over the group and pixels of |pred - target|^p)^(1/p), a sum and not a mean.

    Returns:
        Errors of shape (B, G); without ``edges`` all channels form one group.
    """
    return _group_sums(_difference(pred_BCHW, target_BCHW), edges, p) ** (1 / p)


def relative_lp_error(
    pred_BCHW: Tensor,
    target_BCHW: Tensor,
    *,
    edges: Sequence[int] | None = None,
    p: int = 1,
    zero_norm: float = ZERO_NORM,
) -> Tensor:
    """Relative error in percent, 100 (sum |pred - target|^p / sum |target|^p)^(1/p) per sample and group.

    A group whose label vanishes identically is divided by ``zero_norm`` instead of its sum.

    Returns:
        Errors of shape (B, G); without ``edges`` all channels form one group.

    References:
        Herde et al. 2024, "Poseidon: Efficient Foundation Models for PDEs", Section 4 (p = 1).
    """
    error_BG = _group_sums(_difference(pred_BCHW, target_BCHW), edges, p)
    norm_BG = _group_sums(_precise(target_BCHW), edges, p)
    norm_BG = torch.where(norm_BG == 0, torch.full_like(norm_BG, zero_norm), norm_BG)
    return 100 * (error_BG / norm_BG) ** (1 / p)


def rmse(pred_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Root mean square error over space, shape (B, C), in the units of the fields."""
    return _difference(pred_BCHW, target_BCHW).square().mean(dim=(-2, -1)).sqrt()


def vrmse(pred_BCHW: Tensor, target_BCHW: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Root mean square error over the spatial standard deviation of the target, shape (B, C).

    Predicting each field's spatial mean scores 1, whatever the units.

    References:
        Ohana et al. 2024, "The Well", Section 4: sqrt(<(u - v)^2> / (<(u - <u>)^2> + eps)).
    """
    variance_BC = _precise(target_BCHW).var(dim=(-2, -1), correction=0)
    return (_difference(pred_BCHW, target_BCHW).square().mean(dim=(-2, -1)) / (variance_BC + eps)).sqrt()


def power_spectrum(field_BCHW: Tensor) -> Tensor:
    """Isotropic power spectrum: squared Fourier coefficients summed over shells of rounded wave number.

    The shells partition the spectrum, so the sum over k equals the spatial mean of the squared field
    (Parseval). Wave numbers count periods per side.

    Returns:
        Power of shape (B, C, K) for k = 0 ... K-1.
    """
    field = _precise(field_BCHW)
    power_BCM = torch.fft.fft2(field, norm="forward").abs().square().flatten(-2)
    height, width = field.shape[-2:]
    shell_M = shells(height, width, field.device)
    spectrum = power_BCM.new_zeros(*power_BCM.shape[:-1], int(shell_M.max()) + 1)
    return spectrum.index_add_(-1, shell_M, power_BCM)


def shells(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Rounded length of the integer wave vector of every Fourier mode, flattened, shape (H * W,)."""
    k_H = torch.fft.fftfreq(height, 1 / height, device=device)
    k_W = torch.fft.fftfreq(width, 1 / width, device=device)
    return (k_H[:, None].square() + k_W.square()).sqrt().round().long().flatten()


def band_error(
    pred_BCHW: Tensor,
    target_BCHW: Tensor,
    *,
    edges: Sequence[int] | None = None,
    bands: Sequence[int] = BANDS,
    zero_norm: float = ZERO_NORM,
) -> Tensor:
    """Relative L2 error in percent inside bands of wave numbers.

    Band n holds the wave numbers from ``bands[n]`` up to ``bands[n + 1]``, the last one being open. A band
    with less than the share ``zero_norm`` of the group's power is divided by that share: its own is rounding.

    Returns:
        Errors of shape (B, G, N); a band that the grid cannot resolve has error 0.
    """
    error_BCK = power_spectrum(_difference(pred_BCHW, target_BCHW))
    norm_BCK = power_spectrum(target_BCHW)
    error_BGN, norm_BGN = (_band_sums(s, edges, bands) for s in (error_BCK, norm_BCK))
    total_BG1 = norm_BGN.sum(-1, keepdim=True)
    floor_BG1 = zero_norm * torch.where(total_BG1 == 0, torch.ones_like(total_BG1), total_BG1)
    return 100 * (error_BGN / norm_BGN.maximum(floor_BG1)).sqrt()


def median(errors_NG: Tensor) -> Tensor:
    """Median over samples; the mean of the two middle values if their number is even."""
    ordered = errors_NG.sort(dim=0).values
    middle = (len(ordered) - 1) // 2
    return ordered[middle : len(ordered) // 2 + 1].mean(dim=0)


def summarise(
    errors_NG: Tensor,
    groups: Sequence[Sequence[str]],
    kind: str,
    scored: Sequence[Sequence[str]] | None = None,
) -> dict[str, Tensor]:
    """Statistics over samples, with the names under which Poseidon reports them.

    Per group ``{group}/{median,mean,std,min,max}_{kind}_error`` (population standard deviation), the group's
    name being its channel names joined; a single channel has no prefix. Over groups
    ``mean_{kind}_error`` (of the means) and ``mean_over_median_{kind}_error``, which include constant and
    masked quantities; ``scored_{mean,median}_{kind}_error`` average over the ``scored`` groups only, as the
    paper's tables do.

    Raises:
        ValueError: If ``scored`` names a group that is not among ``groups``.
    """
    names = [tuple(group) for group in groups]
    assert errors_NG.shape[1:] == (len(names),), (errors_NG.shape, names)
    single = len(names) == 1 and len(names[0]) == 1
    middle, mean = median(errors_NG), errors_NG.mean(dim=0)
    statistics = {
        "median": middle,
        "mean": mean,
        "std": errors_NG.std(dim=0, correction=0),
        "min": errors_NG.amin(dim=0),
        "max": errors_NG.amax(dim=0),
    }
    report: dict[str, Tensor] = {}
    if not single:
        report[f"mean_{kind}_error"] = mean.mean()
        report[f"mean_over_median_{kind}_error"] = middle.mean()
    kept = _positions(names, names if scored is None else [tuple(group) for group in scored])
    if kept:
        report[f"scored_median_{kind}_error"] = middle[kept].mean()
        report[f"scored_mean_{kind}_error"] = mean[kept].mean()
    for index, group in enumerate(names):
        prefix = "" if single else "".join(group) + "/"
        for name, values in statistics.items():
            report[f"{prefix}{name}_{kind}_error"] = values[index]
    return report


def _positions(groups: list[tuple[str, ...]], scored: list[tuple[str, ...]]) -> list[int]:
    """Indices of the scored groups."""
    unknown = [group for group in scored if group not in groups]
    if unknown:
        raise ValueError(f"scored group {unknown[0]} is not one of {groups}")
    return [index for index, group in enumerate(groups) if group in scored]


def _precise(x: Tensor) -> Tensor:
    """Float64 where the device has it; Apple's GPUs do not."""
    return x.float() if x.device.type == "mps" else x.double()


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    """Difference in float64.

    Raises:
        ValueError: If the shapes differ; broadcasting would hide a wrong channel count.
    """
    if pred.shape != target.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")
    return _precise(pred) - _precise(target)


def _group_sums(x_BCHW: Tensor, edges: Sequence[int] | None, p: int) -> Tensor:
    """Sum of |x|^p over the channels of a group and space, shape (B, G)."""
    sums_BC = x_BCHW.abs().pow(p).sum(dim=(-2, -1))
    return _sum_groups(sums_BC, edges, dim=1)


def _sum_groups(x: Tensor, edges: Sequence[int] | None, dim: int) -> Tensor:
    """Sum consecutive channels along ``dim``.

    Raises:
        ValueError: If the groups do not cover exactly the channels.
    """
    edges = [0, x.shape[dim]] if edges is None else edges
    if edges[-1] != x.shape[dim]:
        raise ValueError(f"groups cover {edges[-1]} channels but the fields have {x.shape[dim]}")
    return torch.stack([x.narrow(dim, a, b - a).sum(dim) for a, b in pairwise(edges)], dim)


def _band_sums(spectrum_BCK: Tensor, edges: Sequence[int] | None, bands: Sequence[int]) -> Tensor:
    """Power per group and band, shape (B, G, N)."""
    ends = [*bands[1:], spectrum_BCK.shape[-1]]
    parts = [spectrum_BCK[..., a : max(a, b)].sum(-1) for a, b in zip(bands, ends, strict=True)]
    return _sum_groups(torch.stack(parts, -1), edges, dim=1)
