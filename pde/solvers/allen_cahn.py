"""Allen-Cahn equation u_t = Laplace u - eps^2 u (u^2 - 1) on the periodic unit square, and the set ACE.

Exponential time differencing, fourth order (ETDRK4, Cox and Matthews 2002), with the coefficients of Kassam
and Trefethen (2005). Diffusion is exact, so only the reaction limits the step. Fronts between the phases -1
and 1 have the profile tanh(eps s / sqrt(2)); for eps = 220 its width is less than a cell of a 128 x 128 grid,
therefore the recipe solves on a finer grid and stores a subset of its points.

Shapes: B samples, T snapshots, N stored points per axis, F solver points per axis, K columns of a spectrum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.pde.solvers.recipes import Recipe, SampleRequest
from thalweg.pde.solvers.seeding import draw, integer, uniform

SOLVER_POINTS = 256
"""Least number of points per axis on which the recipe solves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllenCahnConfig:
    """Numbers of the equation and of the scheme."""

    resolution: int
    """Grid points F per axis."""
    epsilon: float = 220.0
    """Square root of the reaction rate."""
    max_step: float = 0.25
    """Largest time step times the decay rate 2 eps^2 of disturbances of a phase."""


class AllenCahn:
    """Solver for a batch of initial data; all samples share the time step, which depends on eps alone."""

    def __init__(
        self,
        config: AllenCahnConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.config = config
        self.dtype = dtype
        n = config.resolution
        rows = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        columns = torch.arange(n // 2 + 1, dtype=torch.float64)
        self.laplace_FK = -((2 * math.pi) ** 2) * (rows[:, None] ** 2 + columns**2).to(device)

    def snapshots(self, u_BFF: Tensor, times: Sequence[float]) -> Iterator[Tensor]:
        """Solve from t = times[0] and yield (B, F, F) at each of the times, in order."""
        u_BFF = u_BFF.to(self.laplace_FK.device, self.dtype)
        yield u_BFF
        spectrum_BFK = torch.fft.rfft2(u_BFF)
        tables: dict[float, _Tableau] = {}
        for start, stop in itertools.pairwise(times):
            # Equal intervals differ in the last bits; rounding lets them share the coefficients.
            span = float(f"{stop - start:.12g}")
            steps = math.ceil(span * 2 * self.config.epsilon**2 / self.config.max_step)
            if span not in tables:
                tables[span] = _Tableau.of(self.laplace_FK, span / steps, self.dtype)
            for _ in range(steps):
                spectrum_BFK = self._step(spectrum_BFK, tables[span])
            yield self._field(spectrum_BFK)

    def _step(self, v: Tensor, table: _Tableau) -> Tensor:
        """One step of ETDRK4."""
        n_v = self._reaction(v)
        half = table.decay_half * v
        a = half + table.half * n_v
        n_a = self._reaction(a)
        b = half + table.half * n_a
        n_b = self._reaction(b)
        c = table.decay_half * a + table.half * (2 * n_b - n_v)
        return (
            table.decay * v + table.first * n_v + table.middle * (n_a + n_b) + table.last * self._reaction(c)
        )

    def _reaction(self, spectrum_BFK: Tensor) -> Tensor:
        """Spectrum of -eps^2 u (u^2 - 1)."""
        u_BFF = self._field(spectrum_BFK)
        return torch.fft.rfft2(self.config.epsilon**2 * (u_BFF - u_BFF**3))

    def _field(self, spectrum_BFK: Tensor) -> Tensor:
        return torch.fft.irfft2(spectrum_BFK, s=(self.config.resolution, self.config.resolution))


@dataclass(frozen=True, slots=True)
class _Tableau:
    """Coefficients of ETDRK4 for one time step h, with z = h L and L the symbol of the Laplacian."""

    decay: Tensor
    decay_half: Tensor
    half: Tensor
    first: Tensor
    middle: Tensor
    last: Tensor

    @classmethod
    def of(cls, laplace_FK: Tensor, step: float, dtype: torch.dtype) -> _Tableau:
        """Evaluate with contour integrals: a mean over a circle about z avoids the cancellation at z = 0."""
        # Coefficients depend on |n|^2 alone, so the circle is laid around few distinct values.
        distinct, place = torch.unique(laplace_FK, return_inverse=True)
        z = (step * distinct).cpu()
        angle = 2 * math.pi * (torch.arange(32, dtype=torch.float64) + 0.5) / 32
        r = z[:, None] + torch.exp(1j * angle)
        e = torch.exp(r)

        def table(values: Tensor) -> Tensor:
            return (step * values.real.mean(-1)).to(place.device, dtype)[place]

        return cls(
            decay=torch.exp(z).to(place.device, dtype)[place],
            decay_half=torch.exp(z / 2).to(place.device, dtype)[place],
            half=table((torch.exp(r / 2) - 1) / r),
            first=table((-4 - r + e * (4 - 3 * r + r**2)) / r**3),
            middle=table(2 * (2 + r + e * (r - 2)) / r**3),
            last=table((-4 - 3 * r - r**2 + e * (4 - r)) / r**3),
        )


def initial(rng: torch.Generator, resolution: int) -> Tensor:
    """Random sines u0 = 1/K sum_{i,j <= K} a_ij (i^2 + j^2)^-r sin(pi i x) sin(pi j y), (N, N) in float64.

    K ~ U{16..32}, r ~ U[0.7, 1], a ~ U[-1, 1]. The paper's text has 1/K^2, which gives a standard deviation
    over all frames of about 0.35; the published data have 0.654, which 1/K reproduces (0.63).
    """
    modes = integer(rng, 16, 32)
    decay = uniform(rng, 0.7, 1.0)
    k = torch.arange(1, modes + 1, dtype=torch.float64)
    a_KK = uniform(rng, -1, 1, modes, modes) * (k[:, None] ** 2 + k**2) ** -decay / modes
    x_N = torch.arange(resolution, dtype=torch.float64) / resolution
    sine_KN = torch.sin(math.pi * k[:, None] * x_N)
    return sine_KN.T @ a_KK @ sine_KN


def recipe(name: str) -> Recipe:
    """Recipe of ACE: 20 snapshots up to T = 2e-4, when the phases have formed."""
    numbers = AllenCahnConfig(resolution=SOLVER_POINTS)
    return Recipe(
        name=name,
        sample=sample,
        parameters={
            "epsilon": numbers.epsilon,
            "initial": "1/K sum a (i^2 + j^2)^-r sin(pi i x) sin(pi j y), K ~ U{16..32}, r ~ U[0.7, 1]",
            "scheme": f"Fourier pseudo-spectral on at least {SOLVER_POINTS}^2 points, ETDRK4",
            "max_step": numbers.max_step,
        },
        times=tuple(2e-4 * k / 19 for k in range(20)),
        resolution_multiple=8,
    )


def sample(request: SampleRequest) -> dict[str, Tensor]:
    """Trajectories (B, T, N, N) of the requested samples, float32 on the request's device."""
    stride = max(1, math.ceil(SOLVER_POINTS / request.resolution))
    config = AllenCahnConfig(resolution=stride * request.resolution)
    solver = AllenCahn(config, request.device, request.torch_dtype)
    u_BFF = draw(request, lambda rng: initial(rng, config.resolution))
    frames = [frame[..., ::stride, ::stride] for frame in solver.snapshots(u_BFF, request.times)]
    return {"solution": torch.stack(frames, dim=1).float()}
