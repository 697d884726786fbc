"""Sums over whole parameters for the rules, also where each process holds a part of a parameter.

Shapes: R rows of a parameter (its first dimension), C the rest. A rule that asks for rows sees its parameters
as (R, C), any other as (R C,).

A sharded parameter contributes what its part contributes, and one collective call adds up the sums of all
parameters in a list. Of rows cut along R each process has its own; rows cut along C are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.core_optim.engine.ops import each, ema_product_
from thalweg.core_optim.engine.tensors import Tensors


@dataclass(frozen=True)
class Layout:
    """Where the part of a parameter lies that this process holds."""

    shape: tuple[int, ...]
    """Shape of the whole parameter; a complex one has one more dimension of size 2."""
    groups: tuple[tuple[Any, int], ...] = ()
    """Process group and cut dimension, for each mesh dimension that cuts the parameter."""
    row_offset: int | None = 0
    """First row of this part, counted in the whole; None for rows cut in strides."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def rows(self) -> int:
        """Rows of the whole parameter; a scalar has one."""
        return self.shape[0] if self.shape else 1


class Context:
    """What a rule knows beside the tensors: its options, the variant for this kind of parameter, and sums.

    Args:
        options: All options of the group.
        variant: What the rule's ``variant`` said for these parameters.
        layouts: Of one parameter, or of each in a list; None where nothing is sharded.
        moduli: Squares are those of complex moduli, the same for the real and the imaginary part.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        variant: str = "",
        layouts: Sequence[Layout] | None = None,
        *,
        moduli: bool = False,
    ) -> None:
        self.options = options
        self.variant = variant
        self.layouts = layouts
        self.moduli = moduli

    def mean_square_(self, mean: Tensor, x: Tensor, beta: Any) -> Tensor:
        """Mean <- beta mean + (1 - beta) x^2, in place; with ``moduli`` |x|^2 for both parts."""
        if not self.moduli:
            return ema_product_(mean, x, x, beta)
        return mean.lerp_(each(_pair_sums, x * x), 1.0 - beta)

    def agreement(self, a: Tensor, b: Tensor) -> Tensor:
        """Numbers that are positive where a and b have the same sign; of moduli, angles below 90 degrees."""
        return each(_pair_sums, a * b) if self.moduli else a * b

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all elements of the parameter, 0-d."""
        return self._over(each(torch.sum, x), dist.ReduceOp.SUM, lambda dim: True)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over all elements of the parameter, 0-d."""
        return self._divide(self.sum(x), x, lambda layout: layout.numel, lambda t: t.numel())

    def norm(self, x: Tensor) -> Tensor:
        """Euclidean norm of the whole parameter, 0-d."""
        if self.layouts is None:
            if isinstance(x, Tensors):
                return Tensors(torch._foreach_norm(x.items))
            return x.square().sum().sqrt()
        return self.sum(x * x).sqrt()

    def std(self, x: Tensor) -> Tensor:
        """Unbiased standard deviation of all elements of the parameter, 0-d; 0 for a single element."""
        centred = self.norm(x - self.mean(x))
        return self._divide(
            centred, x, lambda layout: max(layout.numel - 1, 1) ** 0.5, lambda t: max(t.numel() - 1, 1) ** 0.5
        )

    def alone(self, x: Tensor) -> Tensor:
        """Whether the parameter has one element only, 0-d."""
        if isinstance(x, Tensors):
            sizes = [lay.numel for lay in self.layouts] if self.layouts else [t.numel() for t in x]
            return Tensors([t.new_full((), n == 1, dtype=torch.bool) for t, n in zip(x, sizes)])
        return x.new_full((), x.numel() == 1, dtype=torch.bool)

    def row_sum(self, x_RC: Tensor) -> Tensor:
        """Sum over each row, (R, 1)."""
        found = each(lambda t: t.sum(dim=1, keepdim=True), x_RC)
        return self._over(found, dist.ReduceOp.SUM, lambda dim: dim > 0)

    def row_mean(self, x_RC: Tensor) -> Tensor:
        """Mean over each row, (R, 1)."""
        return self._divide(
            self.row_sum(x_RC), x_RC, lambda layout: layout.numel // max(layout.rows, 1), lambda t: t.shape[1]
        )

    def rows_total(self, x_R1: Tensor) -> Tensor:
        """Sum of row sums over all rows, 0-d."""
        return self._over(each(torch.sum, x_R1), dist.ReduceOp.SUM, lambda dim: dim == 0)

    def below(self, cosine: Tensor, delta: Any, x: Tensor, *, rows: bool) -> Tensor:
        """Whether a cosine is under delta / sqrt(n), n the length of a row or of the whole parameter; 0-d."""

        def length(layout: Layout) -> int:
            return layout.numel // max(layout.rows, 1) if rows else layout.numel

        if isinstance(x, Tensors):
            sizes = [length(lay) for lay in self.layouts or map(_layout_of_view, x)]
            return Tensors([c < delta / max(n, 1) ** 0.5 for c, n in zip(cosine, sizes)])
        return cosine * (x.shape[1] if rows else x.numel()) ** 0.5 < delta

    def row_max(self, x_R1: Tensor) -> Tensor:
        """Largest entry over all rows of numbers >= 0, 0-d."""
        found = each(lambda t: t.amax() if t.numel() else t.new_zeros(()), x_R1)
        return self._over(found, dist.ReduceOp.MAX, lambda dim: dim == 0)

    def block_mean(self, x_RC: Tensor, blocks: int) -> Tensor:
        """Mean over each of ``blocks`` equal runs of rows, (blocks, 1)."""
        if self.layouts is None:
            return each(lambda t: t.view(blocks, -1).mean(dim=1, keepdim=True), x_RC)
        assert isinstance(x_RC, Tensors)
        sums = [
            t.new_zeros(blocks, 1).index_add_(0, _owners(t, lay, blocks), t.sum(dim=1, keepdim=True))
            for t, lay in zip(x_RC.items, self.layouts)
        ]
        total = self._over(Tensors(sums), dist.ReduceOp.SUM, lambda dim: True)
        return Tensors([s * (blocks / lay.numel) for s, lay in zip(total, self.layouts)])

    def block_rows(self, v_B1: Tensor, x_RC: Tensor) -> Tensor:
        """The number of its block for each row that this process holds, (R, 1)."""
        if isinstance(x_RC, Tensors) and self.layouts is not None:
            rows = [v[_owners(t, lay, v.shape[0])] for v, t, lay in zip(v_B1, x_RC, self.layouts)]
            return Tensors(rows)
        return each(lambda v, t: v.repeat_interleave(t.shape[0] // v.shape[0], dim=0), v_B1, x_RC)

    def _divide(
        self, sums: Tensor, x: Tensor, whole: Callable[[Layout], float], part: Callable[[Tensor], float]
    ) -> Tensor:
        if isinstance(sums, Tensors):
            sizes = [whole(lay) for lay in self.layouts] if self.layouts else [part(t) for t in x]
            return Tensors([s / max(n, 1) for s, n in zip(sums, sizes)])
        return sums / part(x)

    def _over(self, parts: Tensor, operation: Any, concerned: Callable[[int], bool]) -> Tensor:
        """Combine the parts of all processes; one call for all tensors that the same processes share."""
        if self.layouts is None:
            return parts
        assert isinstance(parts, Tensors)
        depth = max((len(layout.groups) for layout in self.layouts), default=0)
        for level in range(depth):
            shared: dict[Any, list[int]] = {}
            for i, layout in enumerate(self.layouts):
                if level < len(layout.groups) and concerned(layout.groups[level][1]):
                    shared.setdefault(layout.groups[level][0], []).append(i)
            for group, members in shared.items():
                flat = torch.cat([parts.items[i].reshape(-1) for i in members])
                dist.all_reduce(flat, op=operation, group=group)
                split = flat.split([parts.items[i].numel() for i in members])
                for i, values in zip(members, split):
                    parts.items[i] = values.view(parts.items[i].shape)
        return parts


def _layout_of_view(x_RC: Tensor) -> Layout:
    return Layout(tuple(x_RC.shape))


def _pair_sums(x: Tensor) -> Tensor:
    """Sum of the real and the imaginary part's entries, for both."""
    return x.reshape(-1, 2).sum(dim=1, keepdim=True).expand(-1, 2).reshape(x.shape)


def _owners(x_RC: Tensor, layout: Layout, blocks: int) -> Tensor:
    """Block of each row that this process holds."""
    if layout.row_offset is None:
        raise ValueError(
            f"rows of a parameter of shape {layout.shape} are cut in strides by tensor parallelism under"
            " FSDP, so their heads are not known; allowed: block rows"
        )
    rows = torch.arange(x_RC.shape[0], device=x_RC.device) + layout.row_offset
    return rows // (layout.rows // blocks)
