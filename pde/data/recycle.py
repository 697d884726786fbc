"""Memory for batches that is used again once nobody holds the batch any more.

Fresh memory for every batch costs as much as reading the data: the kernel has to map and clear each page.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A loop holds one batch while the next is made, another lies between loader and loop; two tensors each.
_KEPT = 6


@dataclass(slots=True)
class _Slot:
    array: np.ndarray
    lease: weakref.ref[np.ndarray]


class Recycler:
    """Gives float32 tensors, reusing memory of earlier ones.

    A tensor made from an array holds that array as long as the tensor or any view of it lives, so a dead weak
    reference proves that the memory is free.
    """

    def __init__(self) -> None:
        self._slots: list[_Slot] = []

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised float32 tensor of a shape."""
        self._slots = [slot for slot in self._slots if slot.array.shape == shape or slot.lease() is not None]
        for slot in self._slots:
            if slot.array.shape == shape and slot.lease() is None:
                return self._lend(slot)
        slot = _Slot(np.empty(shape, np.float32), lambda: None)  # type: ignore[arg-type]
        if len(self._slots) < _KEPT:
            self._slots.append(slot)
        return self._lend(slot)

    @staticmethod
    def _lend(slot: _Slot) -> Tensor:
        lent = slot.array.view()
        slot.lease = weakref.ref(lent)
        return torch.from_numpy(lent)

    def __getstate__(self) -> dict[str, Any]:
        return {"_slots": []}
