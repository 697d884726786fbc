"""Fourier-Galerkin tools on the periodic unit square: wave numbers, dealiased products, Biot-Savart law.

Shapes: B batch, C fields, N grid points per axis, M = 3N/2 points of the padded grid, K = N/2 columns.
Spectra are (..., N, K): rows are the wave numbers along x in FFT order, columns those along y, 0 .. N/2 - 1.
The Nyquist row and column are absent (zero), so that a spectrum and its derivative are both real fields.
The transforms carry 1/N^2, so coefficients do not depend on the resolution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SpectralGrid:
    """Wave numbers and transforms for one resolution, device and precision.

    Args:
        resolution: Even number N of grid points per axis; point (i, j) lies at (i/N, j/N).
        device: Where the tensors live.
        dtype: Precision of the fields, float32 or float64.
    """

    def __init__(
        self, resolution: int, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float64
    ) -> None:
        if resolution % 2 or resolution < 4:
            raise ValueError(f"a spectral grid needs an even resolution of at least 4, got {resolution}")
        self.points = resolution
        self.padded = 3 * resolution // 2
        self.columns = resolution // 2
        self.dtype = dtype
        rows = torch.fft.fftfreq(resolution, 1 / resolution, dtype=torch.float64)
        columns = torch.arange(self.columns, dtype=torch.float64)
        keep = (rows != -resolution // 2)[:, None]
        self.n2 = (rows[:, None] ** 2 + columns**2).to(device, dtype)
        """Squared integer wave number (N, K)."""
        self.kx = (2 * math.pi * rows[:, None] * keep).to(device, dtype)
        """Wave number along x, 2 pi n (N, 1)."""
        self.ky = (2 * math.pi * columns).to(device, dtype)
        """Wave number along y (K,)."""
        self.keep = keep.to(device)
        k2 = self.kx**2 + self.ky**2
        self.inverse_k2 = torch.where(k2 > 0, 1 / k2, torch.zeros_like(k2))
        """1/|k|^2, zero for the mean mode (N, K)."""

    def forward(self, x_CNN: Tensor) -> Tensor:
        """Coefficients (..., N, K) of real fields (..., N, N)."""
        rows = torch.fft.rfft(x_CNN, norm="forward")[..., : self.columns]
        return torch.fft.fft(rows, dim=-2, norm="forward") * self.keep

    def backward(self, x_CNK: Tensor) -> Tensor:
        """Real fields (..., N, N) of coefficients (..., N, K)."""
        rows = torch.fft.ifft(x_CNK, dim=-2, norm="forward")
        return torch.fft.irfft(rows, n=self.points, norm="forward")

    def to_padded(self, x_CNK: Tensor) -> Tensor:
        """Values (..., M, M) on the padded grid; products of two such fields are free of aliasing."""
        rows = torch.fft.ifft(self.insert_rows(x_CNK), dim=-2, norm="forward")
        return torch.fft.irfft(rows, n=self.padded, norm="forward")

    def from_padded(self, x_CMM: Tensor) -> Tensor:
        """Coefficients (..., N, K) of fields on the padded grid, truncated to the kept modes."""
        rows = torch.fft.rfft(x_CMM, norm="forward")[..., : self.columns]
        full = torch.fft.fft(rows, dim=-2, norm="forward")
        half = self.columns
        return torch.cat([full[..., :half, :], full[..., self.padded - half :, :]], dim=-2) * self.keep

    def insert_rows(self, x_CNK: Tensor) -> Tensor:
        """Insert zero rows between the positive and the negative wave numbers along x: N -> M rows."""
        gap = x_CNK.new_zeros(*x_CNK.shape[:-2], self.padded - self.points, self.columns)
        return torch.cat([x_CNK[..., : self.columns, :], gap, x_CNK[..., self.columns :, :]], dim=-2)

    def curl(self, velocity_B2NK: Tensor) -> Tensor:
        """Vorticity w = dv/dx - du/dy of a velocity, both as coefficients; gradients do not contribute."""
        return 1j * (self.kx * velocity_B2NK[..., 1, :, :] - self.ky * velocity_B2NK[..., 0, :, :])

    def velocity(self, vorticity_BNK: Tensor, mean_B2: Tensor) -> Tensor:
        """Divergence-free velocity (B, 2, N, K) with a given vorticity and mean (Biot-Savart law).

        With the stream function psi, -Laplace psi = w: (u, v) = (d psi/dy, -d psi/dx).
        """
        psi_BNK = vorticity_BNK * self.inverse_k2
        velocity_B2NK = torch.stack([1j * self.ky * psi_BNK, -1j * self.kx * psi_BNK], dim=-3)
        velocity_B2NK[..., 0, 0] = mean_B2.to(velocity_B2NK.dtype)
        return velocity_B2NK

    def project(self, velocity_B2NN: Tensor) -> Tensor:
        """Leray projection: the divergence-free part of a velocity on the grid, with its mean kept."""
        spectrum = self.forward(velocity_B2NN)
        return self.backward(self.velocity(self.curl(spectrum), spectrum[..., 0, 0].real))
