"""Distances between sets of features, in closed form and double precision.

Shapes: N and M samples, F features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROUPS = 10


def gaussian(features_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F).

    Raises:
        ValueError: For less than two samples.
    """
    if len(features_NF) < 2:
        raise ValueError(f"a covariance needs two samples or more, got {len(features_NF)}")
    x = features_NF.double()
    mean = x.mean(dim=0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Squared Frechet distance of two Gaussians (Dowson and Landau 1982; the FID of Heusel et al. 2017).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), which is symmetric positive semidefinite
    inside, so that no complex root is met.
    """
    return max(0.0, float(squared_frechet(a, b)))


def squared_frechet(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The same as a tensor, which differentiates by the second Gaussian; rounding may take it below 0."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * _without_rounding(values).sqrt()) @ vectors.T
    inner = torch.linalg.eigvalsh(root @ cov_b @ root)
    inner = inner[_without_rounding(inner) > 0]  # the root of 0 has no derivative
    shift = (mean_a - mean_b).square().sum()
    return shift + cov_a.trace() + cov_b.trace() - 2 * inner.sqrt().sum()


def _without_rounding(values: Tensor) -> Tensor:
    """Eigenvalues with nought for those that are rounding errors, which a square root would make large."""
    least = len(values) * torch.finfo(values.dtype).eps * float(values.detach().abs().max())
    return torch.where(values > least, values, 0.0)


def polynomial_mmd(x_NF: Tensor, y_MF: Tensor, paired: bool = False) -> float:
    """Unbiased squared MMD with the kernel (x.y / F + 1)^3, the KID of Binkowski et al. 2018.

    All pairs are used, in place of the mean over subsets that libraries take.

    Args:
        x_NF: Features.
        y_MF: Features.
        paired: Row i of both belongs together, as from one noise, and is left out of the products between
            the sets (Gretton et al. 2012, Eq. 4), so that equal sets are at distance nought.

    Raises:
        ValueError: For less than two samples of either.
    """
    n, m = len(x_NF), len(y_MF)
    if min(n, m) < 2:
        raise ValueError(f"a discrepancy needs two samples or more of each set, got {n} and {m}")
    x, y = x_NF.double(), y_MF.double()
    xx, yy, xy = cubic(x, x), cubic(y, y), cubic(x, y)
    between = (xy.sum() - xy.trace()) / (n * (n - 1)) if paired else xy.mean()
    return float(
        (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * between
    )


def cubic(x_NF: Tensor, y_MF: Tensor) -> Tensor:
    """The kernel (x.y / F + 1)^3 of all pairs, (N, M)."""
    return (x_NF @ y_MF.T / x_NF.shape[1] + 1) ** 3


def jackknife(
    statistic: Callable[[Tensor], float], count: int, groups: int = GROUPS, least: int = 2
) -> float:
    """Standard error of a statistic of samples, from leaving out each of a few groups in turn.

    It needs no random numbers. Infinite where there are not enough samples for two groups with ``least``
    left.

    Args:
        statistic: Of the samples with these numbers.
        count: Samples.
        groups: Groups; sample i is in group i modulo their number, so that each has all of the classes that
            come in turn.
        least: Samples that the statistic needs.
    """
    groups = min(groups, count)
    if groups < 2 or count - -(-count // groups) < least:
        return float("inf")
    rows = torch.arange(count)
    kept = [rows[rows % groups != k] for k in range(groups)]
    values = torch.tensor([statistic(part) for part in kept], dtype=torch.float64)
    return float(((groups - 1) / groups * (values - values.mean()).square().sum()).sqrt())
