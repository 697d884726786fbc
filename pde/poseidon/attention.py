"""Window attention of Swin v2: cosine similarity, continuous relative position bias (arXiv 2111.09883).

Shapes: B batch, M windows of one grid, N tokens of one window, D width, H heads, E = D/H, h/w window sides.
Normalisation, scale, bias and softmax are computed in float32 at least, also under autocast.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.pde.poseidon.attend import cosine_attention
from thalweg.pde.poseidon.fused import linear, slide_back
from thalweg.pde.poseidon.windows import Windows

MAX_LOGIT_SCALE = math.log(100.0)
# Logarithm of the largest scale at which tiles may stand for masked windows.
_MAX_SEPARATED = math.log(75.0)
_HIDDEN = 512


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which autocast does not touch operations on that device."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def offsets(window: int, scaled_by: int, device: torch.device) -> Tensor:
    """Log-spaced offsets between tokens along one axis: -(window-1) .. window-1, shape (2*window-1,).

    sign(c) log2(1 + |c|) / log2(8) with c = 8 r / (scaled_by - 1) (section 3.3), in float32 and in the order
    that the published weights were trained with. A window of one token has the single offset 0.
    """
    r = torch.arange(-(window - 1), window, dtype=torch.float32, device=device)
    c = r / max(scaled_by - 1, 1) * 8
    return torch.sign(c) * torch.log2(torch.abs(c) + 1.0) / math.log2(8)


class PositionBias(nn.Sequential):
    """16 sigmoid(MLP(offset)), evaluated once per distinct offset and then spread over all pairs of tokens.

    Without gradients the small table is kept until the parameters, their dtype or device change.
    """

    def __init__(self, num_heads: int, window: tuple[int, int], scaled_by: tuple[int, int]) -> None:
        super().__init__(nn.Linear(2, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, num_heads, bias=False))
        self.window = window
        self.scaled_by = scaled_by
        self._cache = _TableCache()

    def forward(self) -> Tensor:
        """Bias (H, N, N), in float32 or the wider dtype of the parameters."""
        return self.of_shapes([self.window])[0]

    def of_shapes(self, shapes: Collection[tuple[int, int]]) -> list[Tensor]:
        """Biases (H, N, N) of the window or of smaller rectangles of tokens in it."""
        table = self.table()
        return [_spread(table, self.window, shape) for shape in shapes]

    def table(self) -> Tensor:
        """Bias per offset, shape (H, 2h-1, 2w-1)."""
        parameters = (self[0].weight, self[0].bias, self[2].weight)
        wants_grad = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if self.training or wants_grad or torch.compiler.is_compiling():
            return self._table(*parameters)
        cached = self._cache.get(parameters)
        return cached if cached is not None else self._cache.put(parameters, self._table(*parameters))

    def _table(self, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor) -> Tensor:
        device, dtype = weight_in.device, torch.promote_types(weight_in.dtype, torch.float32)
        rows, cols = (offsets(n, s, device).to(dtype) for n, s in zip(self.window, self.scaled_by))
        weight_in, bias_in, weight_out = (p.to(dtype) for p in (weight_in, bias_in, weight_out))
        # The first layer of a grid of offsets is a sum of one term per axis.
        hidden = rows[:, None, None] * weight_in[:, 0] + (cols[:, None] * weight_in[:, 1] + bias_in)
        with full_precision(device):
            logits = weight_out @ hidden.relu_().flatten(0, 1).t()
            return 16 * torch.sigmoid(logits).unflatten(1, hidden.shape[:2])

    def clear_cache(self) -> None:
        """Forget the table."""
        self._cache = _TableCache()

    def train(self, mode: bool = True) -> PositionBias:
        """Switch mode and forget the table."""
        self.clear_cache()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> PositionBias:
        self.clear_cache()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.clear_cache()
        super()._load_from_state_dict(*args)


def _spread(table: Tensor, window: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Bias (H, N, N) between the tokens of a rectangle from a table (H, 2h-1, 2w-1) of offsets."""
    h, w = shape
    rows, cols = window[0] - h, window[1] - w
    # Entry (i, j) is table[i - j + w - 1] per axis: windows sliding back over the flipped table.
    flipped = table[:, rows : rows + 2 * h - 1, cols : cols + 2 * w - 1].flip(1, 2)
    pairs = slide_back(slide_back(flipped, 2, w), 2, h)
    return pairs.reshape(-1, h * w, h * w)


class _TableCache:
    """One table and the parameters it was computed from. Never copied along with its module."""

    def __init__(self) -> None:
        self.table: Tensor | None = None
        self.stamp: tuple[Any, ...] = ()
        self.copies: tuple[Tensor, ...] = ()

    def get(self, parameters: tuple[Tensor, ...]) -> Tensor | None:
        if self.table is None or self.stamp != _stamp(parameters):
            return None
        # Edits through ``.data`` leave no trace in the stamp; comparing values on CPU costs microseconds.
        if not all(torch.equal(a, b) for a, b in zip(self.copies, parameters)):
            return None
        return self.table

    def put(self, parameters: tuple[Tensor, ...], table: Tensor) -> Tensor:
        stamp = _stamp(parameters)
        if stamp:
            self.stamp, self.table = stamp, table
            self.copies = tuple(p.detach().clone() for p in parameters if p.device.type == "cpu")
        return table

    def __deepcopy__(self, memo: dict[int, Any]) -> _TableCache:
        return _TableCache()

    def __reduce__(self) -> tuple[type[_TableCache], tuple[()]]:
        return _TableCache, ()


def _stamp(parameters: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Identity and version of the parameters; empty for tensors that have neither."""
    if torch._C._are_functorch_transforms_active() or any(p.is_inference() or p.is_meta for p in parameters):
        return ()
    return tuple((p.data_ptr(), p._version, p.dtype, p.device) for p in parameters)


class CosineAttention(nn.Module):
    """Multi-head attention of tokens within windows, with logits scale * cos(q, k) + bias."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        windows: Windows,
        *,
        scaled_by: tuple[int, int],
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.windows = windows
        self.dropout = dropout
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        self.continuous_position_bias_mlp = PositionBias(num_heads, windows.window, scaled_by)
        self.query = nn.Linear(width, width, bias=qkv_bias)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=qkv_bias)

    def forward(self, x_XND: Tensor, tiled: bool = False) -> Tensor:
        """Mix the tokens of every window, or of every tile if they come in that order (X = B); shape kept."""
        q, k, v = (linear(layer, x_XND) for layer in (self.query, self.key, self.value))
        with full_precision(x_XND.device):
            heads = [self._heads(t) for t in (q, k, v)]
            out_XNHE = self._attend_tiles(*heads) if tiled else self._attend(*heads)
        return out_XNHE.flatten(2).to(v.dtype)

    def separates(self) -> bool:
        """Whether the shift mask surely separates tokens completely, so that tiles may replace windows.

        It lowers logits by 200. No logit differs from another by more than twice the scale and the 16 of the
        bias, so that masked tokens keep less than e^-34 of the weight as long as scales stay below 75.
        """
        return self.logit_scale.detach().amax().item() < _MAX_SEPARATED

    def _heads(self, t_XND: Tensor) -> Tensor:
        wide = t_XND.to(torch.promote_types(t_XND.dtype, torch.float32))
        return wide.unflatten(-1, (self.num_heads, -1))

    def _scale(self, dtype: torch.dtype) -> Tensor:
        return self.logit_scale[..., 0].to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()

    def _attend(self, q_XNHE: Tensor, k_XNHE: Tensor, v_XNHE: Tensor) -> Tensor:
        dtype = q_XNHE.dtype
        bias_MHNN = self.continuous_position_bias_mlp().to(dtype)[None]
        if self.windows.shifted:
            bias_MHNN = self.windows.shift_mask(bias_MHNN.device, dtype)[:, None] + bias_MHNN
        dropout = self.dropout if self.training else 0.0
        return cosine_attention(q_XNHE, k_XNHE, v_XNHE, self._scale(dtype), bias_MHNN, dropout)

    def _attend_tiles(self, q_BNHE: Tensor, k_BNHE: Tensor, v_BNHE: Tensor) -> Tensor:
        scale, tiles = self._scale(q_BNHE.dtype), self.windows.tiles
        dropout = self.dropout if self.training else 0.0
        sizes = [count * h * w for (h, w), count in tiles.items()]
        parts = zip(*(t.split(sizes, 1) for t in (q_BNHE, k_BNHE, v_BNHE)))
        biases = self.continuous_position_bias_mlp.of_shapes(tiles)
        mixed = []
        for qkv, bias_HNN in zip(parts, biases):
            tile = (t.unflatten(1, (-1, bias_HNN.shape[1])).flatten(0, 1) for t in qkv)
            out = cosine_attention(*tile, scale, bias_HNN.to(scale.dtype)[None], dropout)
            mixed.append(out.reshape(qkv[0].shape))
        return torch.cat(mixed, 1)
