"""Empirical model statistics: the tables l, s and b of DPM-Solver-v3, estimated from a network.

Zheng et al. 2023 (arXiv 2310.13268) choose l, s and b so that what a step extrapolates varies least. With the
notation of :mod:`thalweg.diffusion.solvers.v3`, at every lambda

    l      minimises  E |d(sigma e - l x) / dx|^2,       so l is the mean of the diagonal of sigma de/dx;
    s, b   minimise   E |f' - s f - b|^2,                a regression of f' = df/dlambda on f,

with means over states x = alpha x0 + sigma noise of given data. f' is taken along the ODE, on which
dy/dlambda = -rho e. With u = rho e, and w = rho de/dlambda,

    f = u - l y,    f' = (l - 1) u + w - l' y,    as  (l y)' = l' y - l u  and  (rho)' = -rho,

so that means and products of u, w and y say all. The diagonal is estimated by products of the Jacobian with
random signs (Hutchinson), and de/dlambda is a product as well.

Shapes: B samples, C channels, ... space, M values of lambda, K = C channels or 1 for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thalweg.diffusion.parameterization import Kind, to_noise
from thalweg.diffusion.schedules import NoiseSchedule
from thalweg.diffusion.solvers.schedule import SolverSchedule, Step
from thalweg.diffusion.solvers.v3 import V3Tables

Array = NDArray[np.float64]
Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""What a network answers at a state (B, ...), alpha, sigma and label; the last three are single numbers."""

ENTRIES = 101
_STEP = 1e-3
"""Difference of lambda for derivatives of the noise schedule."""
_CONSTANT = 1e-9
"""Part of the variance of u and l y below which f counts as constant, and s is of no use."""


def estimate_ems(
    network: Network,
    samples: Tensor,
    noise: NoiseSchedule,
    *,
    kind: Kind = "data",
    lam: Sequence[float] | None = None,
    probes: int = 1,
    by_channel: bool = False,
    batch: int = 64,
    seed: int = 0,
) -> V3Tables:
    """Tables of l, s and b for a network.

    Every lambda sees the same noises, so that the tables are smooth. A sample costs one evaluation, one
    backward pass and ``1 + probes`` products with the Jacobian per lambda.

    Args:
        network: Of (x, alpha, sigma, label); it is differentiated twice by all four.
        samples: Data (B, ...), or (B, C, ...) for tables by channel.
        noise: Noise schedule of the network.
        kind: What the network predicts.
        lam: Values of lambda, rising; 101 of them over the range of the noise schedule by default, where a
            first lambda of minus infinity becomes that of t = 0.999 t_start.
        probes: Random signs for the diagonal of the Jacobian.
        by_channel: Tables for each channel (dimension 1) rather than one for all numbers of a state.
        batch: Samples at once.
        seed: Of noises and signs.

    Raises:
        ValueError: For too few samples, probes or lambdas.
        ArithmeticError: If a mean is not finite.
    """
    if len(samples) < 2 or probes < 1 or batch < 1:
        given = f"{len(samples)} samples, {probes} probes, batch {batch}"
        raise ValueError(f"{given}; allowed: 2 samples or more, the others 1 or more")
    if by_channel and samples.ndim < 3:
        raise ValueError(f"tables by channel need samples (B, C, ...), got shape {tuple(samples.shape)}")
    if lam is not None and len(lam) < 2:
        raise ValueError(f"a table needs two values of lambda or more, got {len(lam)}")
    table = default_lam(noise) if lam is None else np.asarray(lam, np.float64)
    found = [
        _moments(network, samples, noise, float(value), kind, probes, by_channel, batch, seed)
        for value in table
    ]
    diagonal_MK, mean_MK3, product_MK33 = (np.stack(part) for part in zip(*found, strict=True))
    columns = [
        _regression(table, *part)
        for part in zip(diagonal_MK.T, mean_MK3.swapaxes(0, 1), product_MK33.swapaxes(0, 1), strict=True)
    ]
    l_KM, s_KM, b_KM = (tuple(tuple(row.tolist()) for row in part) for part in zip(*columns, strict=True))
    if not by_channel:
        return V3Tables(lam=tuple(table.tolist()), l=l_KM[0], s=s_KM[0], b=b_KM[0])
    return V3Tables(lam=tuple(table.tolist()), l=l_KM, s=s_KM, b=b_KM)


def with_tables(schedule: SolverSchedule, tables: V3Tables) -> SolverSchedule:
    """The same nodes and orders with the prediction v3, in steps of noise or data that the tables cover."""

    def covered(step: Step, i: int) -> bool:
        again = () if step.corrector is None else step.corrector.derivatives
        used = {step.start, i + 1, *(p for d in (*step.derivatives, *again) for p in d.nodes)}
        return all(tables.covers(schedule.nodes[p].lam) for p in used)

    steps = [
        replace(step, prediction="v3") if step.prediction in ("noise", "data") and covered(step, i) else step
        for i, step in enumerate(schedule.steps)
    ]
    return replace(schedule, steps=tuple(steps), v3=tables)


def default_lam(noise: NoiseSchedule, entries: int = ENTRIES) -> Array:
    """Equal distances of lambda over the range of a noise schedule."""
    first = float(noise.lam(noise.t_start))
    if not np.isfinite(first):
        first = float(noise.lam(0.999 * noise.t_start))
    return np.linspace(first, float(noise.lam(noise.t_end)), entries)


def _levels(noise: NoiseSchedule, lam: float) -> tuple[Array, Array]:
    """Alpha, sigma and label at a lambda, and their derivatives with respect to it."""

    def at(value: float) -> Array:
        t = noise.t_of_lam(value)
        return np.array([float(f(t)) for f in (noise.alpha, noise.sigma, noise.label)])

    return at(lam), (at(lam + _STEP) - at(lam - _STEP)) / (2 * _STEP)


def _moments(
    network: Network,
    samples: Tensor,
    noise: NoiseSchedule,
    lam: float,
    kind: Kind,
    probes: int,
    by_channel: bool,
    batch: int,
    seed: int,
) -> tuple[Array, Array, Array]:
    """Means of the diagonal (K,), of (u, w, y) (K, 3), and of their products (K, 3, 3)."""
    generator = torch.Generator().manual_seed(seed)
    level, slope = (torch.tensor(v, dtype=samples.dtype, device=samples.device) for v in _levels(noise, lam))
    totals: list[Tensor] = []
    for start in range(0, len(samples), batch):
        x0 = samples[start : start + batch]
        e = torch.randn(x0.shape, generator=generator, dtype=x0.dtype).to(x0.device)
        signs = torch.randint(0, 2, (probes, *x0.shape), generator=generator).to(x0) * 2 - 1
        diagonal, u, w, y = _statistics(network, x0, e, signs, level, slope, kind)
        rows = torch.stack([diagonal, u, w, y]).double()
        rows = rows.movedim(2, 1).flatten(2) if by_channel else rows.flatten(1).unsqueeze(1)
        parts = rows[1:].transpose(0, 1)  # (K, 3, n)
        sums = [rows[0].sum(1)[:, None], parts.sum(2), (parts @ parts.mT).flatten(1)]
        totals.append(torch.cat(sums, 1) / (samples.numel() / len(parts)))
    mean = torch.stack(totals).sum(0).cpu().numpy()
    if not np.isfinite(mean).all():
        raise ArithmeticError(f"the network's statistics at lambda {lam:.4g} are not finite")
    return mean[:, 0], mean[:, 1:4], mean[:, 4:].reshape(-1, 3, 3)


def _statistics(
    network: Network, x0: Tensor, e: Tensor, signs: Tensor, level: Tensor, slope: Tensor, kind: Kind
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Diagonal of sigma de/dx, u, w and y, each of the shape of x0."""
    inputs = [(level[0] * x0 + level[1] * e).requires_grad_(), *level.clone().requires_grad_().unbind()]
    x, alpha, sigma, label = inputs
    rho = level[1] / level[0]
    # Attention has second derivatives in its plain form only.
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        noise = to_noise(network(x, alpha, sigma, label), x, alpha, sigma, kind)
        still = [torch.zeros_like(v) for v in slope]
        along = slope[0] / level[0] * x.detach() - level[1] * noise.detach()
        change, *products = _products(noise, inputs, [[along, *slope], *([v, *still] for v in signs)])
    diagonal = torch.stack([v * product for v, product in zip(signs, products, strict=True)]).mean(0)
    return level[1] * diagonal, rho * noise.detach(), rho * change, x.detach() / level[0]


def _products(output: Tensor, inputs: list[Tensor], tangents: list[list[Tensor]]) -> list[Tensor]:
    """Jacobian of an output by some inputs times tangents, one pass each: derivatives of w J by w.

    Forward mode would be one pass less, but not all layers have it (group norm after attention).
    """
    w = torch.zeros_like(output).requires_grad_()
    found = torch.autograd.grad(output, inputs, w, create_graph=True, allow_unused=True)
    used = [k for k, gradient in enumerate(found) if gradient is not None]
    pulled = [found[k] for k in used]
    return [
        torch.autograd.grad(pulled, w, [tangent[k] for k in used], retain_graph=True)[0]
        for tangent in tangents
    ]


def _regression(lam: Array, l_M: Array, mean_M3: Array, product_M33: Array) -> tuple[Array, Array, Array]:
    """Tables l, s and b from the means."""
    from scipy.interpolate import CubicSpline

    slope_M = CubicSpline(lam, l_M).derivative()(lam)
    cov_M33 = product_M33 - mean_M3[:, :, None] * mean_M3[:, None, :]
    one, none = np.ones_like(l_M), np.zeros_like(l_M)
    f_M3 = np.stack([one, none, -l_M], 1)
    change_M3 = np.stack([l_M - 1, one, -slope_M], 1)
    variance_M = np.einsum("mi,mij,mj->m", f_M3, cov_M33, f_M3)
    common_M = np.einsum("mi,mij,mj->m", f_M3, cov_M33, change_M3)
    size_M = cov_M33[:, 0, 0] + l_M**2 * cov_M33[:, 2, 2]
    varies = variance_M > _CONSTANT * size_M
    s_M = np.where(varies, common_M / np.where(varies, variance_M, 1.0), 0.0)
    b_M = np.einsum("mi,mi->m", change_M3 - s_M[:, None] * f_M3, mean_M3)
    return l_M, s_M, b_M
