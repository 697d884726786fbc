"""Spectral change of resolution for periodic fields.

Legend: X Y stored grid, N target points per axis; leading axes are free.
"""

from __future__ import annotations

import numpy as np
import scipy.fft


def downsample(x_XY: np.ndarray, n: int) -> np.ndarray:
    """Periodic field on an n x n grid: its Fourier modes -n/2 <= k < n/2, the others dropped.

    Exact for fields without higher modes. The type is kept.
    """
    modes = scipy.fft.fft2(x_XY, norm="forward")
    for axis in (-2, -1):
        length = x_XY.shape[axis]
        kept = np.r_[0 : n - n // 2, length - n // 2 : length]
        modes = modes.take(kept, axis=axis)
    return np.ascontiguousarray(scipy.fft.ifft2(modes, norm="forward").real).astype(x_XY.dtype, copy=False)
