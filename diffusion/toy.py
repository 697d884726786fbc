"""Gaussian mixtures, whose denoiser and flow are known: the ground truth of solvers and searches.

Shapes: B samples, D dimensions, K components. Pictures are flattened. All of it is float64 and
    differentiable.

For x = alpha x0 + sigma e with x0 ~ sum_k w_k N(m_k, S_k), component k of x has covariance
V_k = alpha^2 S_k + sigma^2 I, and with the responsibilities r_k(x) proportional to w_k N(x; alpha m_k, V_k)

    E[x0 | x] = sum_k r_k (m_k + alpha S_k V_k^-1 (x - alpha m_k)),
    E[e | x]  = sigma sum_k r_k V_k^-1 (x - alpha m_k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.integrate import solve_ivp
from torch import Tensor

from thalweg.diffusion.parameterization import Kind, Level, from_pair


class GaussianMixture:
    """A mixture of Gaussians and its exact denoiser.

    Args:
        weights: K positive numbers; made to sum to one.
        means: K D numbers.
        covariances: K symmetric positive definite matrices D D.

    Raises:
        ValueError: For shapes that do not fit, or matrices that are not covariances.
    """

    def __init__(
        self, weights: ArrayLike | Tensor, means: ArrayLike | Tensor, covariances: ArrayLike | Tensor
    ) -> None:
        weights_K, means_KD, cov_KDD = (
            a.to(torch.float64) if isinstance(a, Tensor) else torch.tensor(np.asarray(a, np.float64))
            for a in (weights, means, covariances)
        )
        if means_KD.ndim != 2:
            raise ValueError(f"means are K D numbers, got shape {tuple(means_KD.shape)}")
        k, d = means_KD.shape
        if weights_K.shape != (k,) or cov_KDD.shape != (k, d, d):
            needed = f"weights {(k,)} and covariances {(k, d, d)}"
            found = f"{tuple(weights_K.shape)} and {tuple(cov_KDD.shape)}"
            raise ValueError(f"{k} means of {d} dimensions need {needed}, got {found}")
        if not (weights_K > 0).all():
            raise ValueError(f"weights must be positive, got {weights_K.tolist()}")
        variances_KD, axes_KDD = torch.linalg.eigh(cov_KDD)
        if not (variances_KD > 0).all() or not torch.allclose(cov_KDD, cov_KDD.mT):
            least = float(variances_KD.min())
            raise ValueError(f"covariances must be symmetric and positive, least variance {least}")
        self.weights_K = weights_K / weights_K.sum()
        self.means_KD = means_KD
        self.covariances_KDD = cov_KDD
        self._variances_KD = variances_KD
        self._axes_KDD = axes_KDD

    @property
    def dim(self) -> int:
        """Number of dimensions D."""
        return self.means_KD.shape[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GaussianMixture:
        """Make a mixture from weights, means and covariances, as arrays or lists.

        Raises:
            ValueError: If one of them is missing.
        """
        names = ("weights", "means", "covariances")
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"a mixture needs {', '.join(names)}; missing: {', '.join(missing)}")
        return cls(*(values[name] for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Weights, means and covariances as plain JSON values."""
        arrays = self.weights_K, self.means_KD, self.covariances_KDD
        return {name: a.tolist() for name, a in zip(("weights", "means", "covariances"), arrays)}

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw data, count D."""
        k_B = torch.multinomial(self.weights_K, count, replacement=True, generator=generator)
        e_BD = torch.randn(count, self.dim, dtype=torch.float64, generator=generator)
        scaled_BD = self._variances_KD[k_B].sqrt() * e_BD
        return self.means_KD[k_B] + torch.einsum("bde,be->bd", self._axes_KDD[k_B], scaled_BD)

    def data(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Mean of the data given the state, in the state's shape.

        Args:
            x: States, B and then D numbers in any shape.
            alpha: A number, or one for each sample.
            sigma: As alpha.
        """
        return self._both(x, alpha, sigma)[0]

    def noise(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Mean of the noise given the state; fine at alpha = 0 and at sigma = 0."""
        return self._both(x, alpha, sigma)[1]

    def velocity(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """Velocity of rectified flow, noise less data."""
        data, noise = self._both(x, alpha, sigma)
        return noise - data

    def predict(self, x: Tensor, alpha: Level, sigma: Level, kind: Kind) -> Tensor:
        """What a perfect network of a kind would give.

        Raises:
            ValueError: For an unknown kind.
        """
        shape = (-1,) + (1,) * (x.ndim - 1)
        alpha, sigma = (a.reshape(shape) if isinstance(a, Tensor) and a.ndim else a for a in (alpha, sigma))
        return from_pair(*self._both(x, alpha, sigma), alpha, sigma, kind)

    def log_density(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """Natural logarithm of the density of states (of the data by default), one number per sample."""
        joint_BK = self._whitened(x, alpha, sigma)[2]
        return torch.logsumexp(joint_BK, 1) - 0.5 * self.dim * float(np.log(2 * np.pi))

    def _whitened(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Offset from each mean along each axis over its variance, B K D; alpha; log joint density, B K."""
        if x.ndim < 2 or x[0].numel() != self.dim:
            raise ValueError(
                f"states of this mixture are B and {self.dim} numbers, got shape {tuple(x.shape)}"
            )
        x_BD = x.reshape(len(x), -1).to(torch.float64)
        alpha, sigma = (torch.as_tensor(a, dtype=torch.float64).reshape(-1, 1, 1) for a in (alpha, sigma))
        centred_BKD = x_BD[:, None] - alpha * self.means_KD
        along_BKD = torch.einsum("bkd,kde->bke", centred_BKD, self._axes_KDD)
        variance_BKD = alpha**2 * self._variances_KD + sigma**2
        scaled_BKD = along_BKD / variance_BKD
        exponent_BK = (along_BKD * scaled_BKD).sum(-1) + variance_BKD.log().sum(-1)
        return scaled_BKD, alpha, self.weights_K.log() - 0.5 * exponent_BK

    def _both(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor]:
        """Means of data and noise."""
        scaled_BKD, alpha_B11, joint_BK = self._whitened(x, alpha, sigma)
        r_BK = torch.softmax(joint_BK, 1)
        data_BKD = torch.einsum("bke,kde->bkd", alpha_B11 * self._variances_KD * scaled_BKD, self._axes_KDD)
        data_BD = torch.einsum("bk,bkd->bd", r_BK, self.means_KD + data_BKD)
        noise_BD = torch.einsum("bk,bke,kde->bd", r_BK, scaled_BKD, self._axes_KDD)
        sigma_B1 = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        return data_BD.to(x.dtype).reshape(x.shape), (sigma_B1 * noise_BD).to(x.dtype).reshape(x.shape)


def exact_states(
    mixture: GaussianMixture,
    x_T: Tensor,
    alpha: Sequence[float],
    sigma: Sequence[float],
    *,
    rtol: float = 1e-12,
    atol: float = 1e-13,
) -> Tensor:
    """States of the probability-flow ODE at nodes, the first of which is that of x_T.

    Divided by sqrt(alpha^2 + sigma^2), every schedule is alpha = cos(a), sigma = sin(a), where dx/da = v
    (Salimans and Ho 2022). So the angle runs from that of the first node to that of the last, zero included,
    by the Runge-Kutta pair of order 8 (DOP853).

    Returns:
        N B D in float64.

    Raises:
        ValueError: If noise does not fall from node to node.
        RuntimeError: If the integrator gives up.
    """
    angle = np.arctan2(sigma, alpha)
    radius = np.hypot(sigma, alpha)
    if not np.all(np.diff(angle) < 0):
        raise ValueError(f"nodes must fall in noise, got sigma {list(sigma)} and alpha {list(alpha)}")
    shape = x_T.shape

    def slope(a: float, y: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(y).reshape(shape)
        return mixture.predict(x, float(np.cos(a)), float(np.sin(a)), "v").numpy().ravel()

    y = x_T.to(torch.float64).numpy().ravel() / radius[0]
    states = [y]
    for begin, end in pairwise(angle.tolist()):
        run = solve_ivp(slope, (begin, end), states[-1], method="DOP853", rtol=rtol, atol=atol)
        if not run.success:
            raise RuntimeError(f"no exact flow between the angles {begin} and {end}: {run.message}")
        states.append(run.y[:, -1])
    return torch.from_numpy(np.stack(states) * radius[:, None]).reshape(-1, *shape)
