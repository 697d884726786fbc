"""Products with the inverse of the empirical Fisher matrix of a window of gradients, in closed form (M-FAC).

F = damping I + (1/M) G^T G for a window G with M rows and D columns. By the Woodbury identity

    F^{-1} x = (x - G^T (G G^T + M damping I)^{-1} G x) / damping,

so that only an M x M matrix is factored, in float64 by Cholesky, and no D x D matrix is formed.
Shapes: M gradients, D parameters, N blocks of S parameters. Source: Frantar et al. 2021, arXiv:2107.03356,
whose recursions give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 23
"""Elements of a window that are held in float64 at once (64 MiB)."""


def _chunks(window_MD: Tensor) -> Iterator[slice]:
    width = max(1, CHUNK // max(1, len(window_MD)))
    for start in range(0, window_MD.shape[1], width):
        yield slice(start, start + width)


def window_gram(window_MD: Tensor) -> Tensor:
    """G G^T (M, M) in float64, whatever the type of the window."""
    gram_MM = torch.zeros(len(window_MD), len(window_MD), dtype=torch.float64, device=window_MD.device)
    for part in _chunks(window_MD):
        wide = window_MD[:, part].double()
        gram_MM += wide @ wide.mT
    return gram_MM


def window_dot(window_MD: Tensor, x_D: Tensor) -> Tensor:
    """G x (M,) in float64, on the device of the window."""
    dot_M = torch.zeros(len(window_MD), dtype=torch.float64, device=window_MD.device)
    for part in _chunks(window_MD):
        dot_M += window_MD[:, part].double() @ x_D[part].to(window_MD.device, torch.float64)
    return dot_M


def window_combine(window_MD: Tensor, weights_M: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """G^T w (D,) on the device of the window, computed in a dtype."""
    weights_M = weights_M.to(window_MD.device, dtype)
    parts = [weights_M @ window_MD[:, part].to(dtype) for part in _chunks(window_MD)]
    return torch.cat(parts) if parts else window_MD.new_zeros(0, dtype=dtype)


def replace_row(window_MD: Tensor, gram_MM: Tensor, row: int, g_D: Tensor) -> None:
    """Put a gradient into a row of the window, in place, and bring G G^T up to date with one product G g.

    The product uses the stored (perhaps rounded) row, so the matrix stays G G^T of what the window holds.
    """
    window_MD[row] = g_D.to(window_MD.device, window_MD.dtype)
    dot_M = window_dot(window_MD, window_MD[row])
    gram_MM[row] = dot_M
    gram_MM[:, row] = dot_M


def factor(gram_MM: Tensor, damping: float) -> Tensor:
    """Lower Cholesky factor of G G^T + M damping I, also of batches; never waits for the device."""
    shift = torch.eye(gram_MM.shape[-1], dtype=gram_MM.dtype, device=gram_MM.device)
    return torch.linalg.cholesky_ex(gram_MM + gram_MM.shape[-1] * damping * shift).L


def row_weights(gram_MM: Tensor, row: int, damping: float) -> Tensor:
    """Weights (M,) with which F^{-1} x = G^T w for the row x of the window.

    F^{-1} G^T = M G^T (G G^T + M damping I)^{-1}: for a gradient in the window nothing cancels and nothing is
    divided by the damping, so G^T w may be computed in single precision.
    """
    unit_M = torch.zeros_like(gram_MM[0])
    unit_M[row] = len(gram_MM)
    return solve(factor(gram_MM, damping), unit_M)


def solve(factor_MM: Tensor, y_M: Tensor) -> Tensor:
    """(G G^T + M damping I)^{-1} y for vectors (..., M)."""
    return torch.cholesky_solve(y_M.unsqueeze(-1), factor_MM).squeeze(-1)


class FisherInverse:
    """Inverse of F = damping I + G^T G / M for a fixed window, never formed.

    Args:
        window_MD: Gradients, one a row; any floating type, on any device. It is kept, not copied.
        damping: Larger than zero.

    Raises:
        ValueError: If the window is no matrix or the damping not above zero.
    """

    def __init__(self, window_MD: Tensor, damping: float) -> None:
        _check(window_MD, damping)
        self.window, self.damping = window_MD, damping
        self.factor = factor(window_gram(window_MD), damping)

    def ihvp(self, x_D: Tensor) -> Tensor:
        """F^{-1} x (D,) in float64, on the device of the window."""
        weights_M = solve(self.factor, window_dot(self.window, x_D))
        x_D = x_D.to(self.window.device, torch.float64)
        return (x_D - window_combine(self.window, weights_M)) / self.damping

    def diagonal(self) -> Tensor:
        """Diagonal of F^{-1} (D,): (1 - |L^{-1} G e_j|^2) / damping."""
        parts = [1.0 - self._whitened(self.window[:, part]).square().sum(0) for part in _chunks(self.window)]
        return torch.cat(parts) / self.damping

    def elements(self, i_K: Tensor, j_K: Tensor) -> Tensor:
        """F^{-1}[i, j] for K pairs of indices."""
        left, right = self._whitened(self.window[:, i_K]), self._whitened(self.window[:, j_K])
        return ((i_K == j_K).double().to(left.device) - (left * right).sum(0)) / self.damping

    def _whitened(self, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, columns.double(), upper=False)


class BlockFisherInverse:
    """As :class:`FisherInverse`, for a block-diagonal F: blocks of S neighbouring parameters.

    Blocks are inverted as S x S matrices, a few at a time and again for every question, so that D S numbers
    are never held. Cheaper than the whole matrix where S is below the number of gradients.

    Args:
        window_MD: Gradients, one a row.
        damping: Larger than zero.
        block_size: S; the last block may be shorter.

    Raises:
        ValueError: If the window is no matrix, the damping not above zero or the size below one.
    """

    def __init__(self, window_MD: Tensor, damping: float, block_size: int) -> None:
        _check(window_MD, damping)
        if block_size < 1:
            raise ValueError(f"block_size is at least 1, not {block_size}")
        self.window, self.damping, self.size = window_MD, damping, block_size

    def _inverses(self) -> Iterator[tuple[slice, Tensor]]:
        size, count = self.size, self.window.shape[1]
        stride = size * max(1, CHUNK // (size * max(size, len(self.window))))
        for start in range(0, count, stride):
            part = slice(start, min(start + stride, count))
            columns = self.window[:, part].double()
            padded = torch.nn.functional.pad(columns, (0, -columns.shape[1] % size))
            blocks_NMS = padded.view(len(self.window), -1, size).transpose(0, 1)
            fisher_NSS = blocks_NMS.mT @ blocks_NMS / len(self.window)
            fisher_NSS.diagonal(dim1=-2, dim2=-1).add_(self.damping)
            yield part, torch.cholesky_inverse(torch.linalg.cholesky_ex(fisher_NSS).L)

    def ihvp(self, x_D: Tensor) -> Tensor:
        """F^{-1} x (D,) in float64, on the device of the window."""
        x_D = x_D.to(self.window.device, torch.float64)
        results = []
        for part, inverse_NSS in self._inverses():
            x = x_D[part]
            x_NS = torch.nn.functional.pad(x, (0, -len(x) % self.size)).view(-1, self.size)
            results.append((inverse_NSS @ x_NS[..., None]).flatten()[: len(x)])
        return torch.cat(results)

    def diagonal(self) -> Tensor:
        """Diagonal of F^{-1} (D,)."""
        parts = [
            inverse_NSS.diagonal(dim1=-2, dim2=-1).flatten()[: part.stop - part.start]
            for part, inverse_NSS in self._inverses()
        ]
        return torch.cat(parts)

    def elements(self, i_K: Tensor, j_K: Tensor) -> Tensor:
        """F^{-1}[i, j] for K pairs of indices; zero where they lie in different blocks."""
        values = torch.zeros(len(i_K), dtype=torch.float64, device=self.window.device)
        i_K, j_K = i_K.to(values.device), j_K.to(values.device)
        together = i_K // self.size == j_K // self.size
        for part, inverse_NSS in self._inverses():
            here = together & (i_K >= part.start) & (i_K < part.stop)
            i, j = i_K[here] - part.start, j_K[here] - part.start
            values[here] = inverse_NSS[i // self.size, i % self.size, j % self.size]
        return values


def fisher_inverse(
    window_MD: Tensor, damping: float, block_size: int | None = None
) -> FisherInverse | BlockFisherInverse:
    """Inverse of the Fisher matrix of a window, whole or (with a block size) of its diagonal blocks."""
    if block_size is None or block_size >= window_MD.shape[-1]:
        return FisherInverse(window_MD, damping)
    return BlockFisherInverse(window_MD, damping, block_size)


def _check(window_MD: Tensor, damping: float) -> None:
    if window_MD.ndim != 2:
        raise ValueError(f"a window has two dimensions (gradients, parameters), not {tuple(window_MD.shape)}")
    if not damping > 0.0:
        raise ValueError(f"damping is above zero, not {damping}")


def obs_scores(weights_D: Tensor, diagonal_D: Tensor) -> Tensor:
    """Rise of the quadratic loss when one weight is removed and the others adapt: w_j^2 / (2 [F^{-1}]_jj)."""
    return weights_D.to(diagonal_D).square() / (2.0 * diagonal_D)


def obs_update(
    inverse: FisherInverse | BlockFisherInverse,
    weights_D: Tensor,
    index: Tensor,
    diagonal_K: Tensor | None = None,
) -> Tensor:
    """Change of all weights (D,) when those at `index` are removed: sum of the single-weight solutions.

    The solution for weight j alone, -w_j / [F^{-1}]_jj F^{-1} e_j, makes it exactly zero and is the minimiser
    of the quadratic model. Summing is what the published pruner does; :func:`joint_update` is exact for
    several. The entries of the diagonal at `index` are computed if not given.
    """
    if diagonal_K is None:
        diagonal_K = inverse.elements(index, index)
    target_D = torch.zeros(weights_D.numel(), dtype=torch.float64, device=diagonal_K.device)
    target_D[index.to(target_D.device)] = -weights_D.to(diagonal_K)[index.to(diagonal_K.device)] / diagonal_K
    return inverse.ihvp(target_D)


def joint_update(window_MD: Tensor, damping: float, weights_D: Tensor, removed_D: Tensor) -> Tensor:
    r"""Change of all weights (D,) that minimises the quadratic model when a set of them becomes zero.

    min 1/2 d^T F d with d = -w on the removed set S has d = -w_S there and, on the rest R,
    d_R = F_RR^{-1} F_RS w_S = G_R^T (G_R G_R^T + M damping I)^{-1} G_S w_S.

    Args:
        window_MD: Gradients.
        damping: Larger than zero.
        weights_D: Weights.
        removed_D: Boolean, true for the weights that are removed.
    """
    _check(window_MD, damping)
    weights_D = weights_D.to(window_MD.device, torch.float64)
    removed_D = removed_D.to(window_MD.device)
    kept_MR = window_MD[:, ~removed_D]
    source_M = window_dot(window_MD, torch.where(removed_D, weights_D, 0.0))
    change_D = -weights_D * removed_D
    change_D[~removed_D] = window_combine(kept_MR, solve(factor(window_gram(kept_MR), damping), source_M))
    return change_D
