"""Change of resolution in Fourier space: crop or extend the spectrum.

Shapes: B batch, C channels, H/W space. Exact for periodic fields that both grids resolve.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spectral_resize(x_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample periodic fields to ``size`` points per axis.

    Wave numbers -n/2 <= f <= n/2 - 1 of the smaller grid are kept on each axis; the Nyquist mode is not split
    and the imaginary part that this may leave is dropped, as in the published model. Half precision is
    resampled in float32, and autocast has no influence.
    """
    with torch.autocast(x_BCHW.device.type, enabled=False):
        x = x_BCHW.to(torch.promote_types(x_BCHW.dtype, torch.float32))
        spectrum = torch.fft.fftshift(torch.fft.fft2(x, norm="forward"), (-2, -1))
        for axis, points in zip((-2, -1), size):
            spectrum = _recentre(spectrum, axis, points)
        spectrum = torch.fft.ifftshift(spectrum, (-2, -1))
        return torch.fft.ifft2(spectrum, norm="forward").real.to(x_BCHW.dtype)


def _recentre(spectrum: Tensor, axis: int, points: int) -> Tensor:
    """Crop or zero-pad one axis of a shifted spectrum, keeping wave number 0 at index points // 2."""
    have = spectrum.shape[axis]
    start = points // 2 - have // 2
    if points <= have:
        return spectrum.narrow(axis, -start, points)
    pads = (start, points - have - start)
    return F.pad(spectrum, pads if axis == -1 else (0, 0, *pads))
