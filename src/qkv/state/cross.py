"""The projected memory that a cross-attention reads."""

from collections.abc import Sequence
from math import gcd
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Cross:
    """Keys and values of M memories (M G S K and V), projected once, read by B rows.

    `fold` consecutive rows read the same memory (the beams of one sentence), so that the memory is neither copied nor
    read again for each of them; choosing among those rows costs nothing.
    """

    def __init__(self, k: Tensor, v: Tensor, fold: int = 1) -> None:
        self.k, self.v, self.fold = k, v, fold
        self.sizes = [k.shape[2]] * len(k)
        """How much of each is not padding that joining has added."""

    @property
    def size(self) -> int:
        """The length of the longest memory."""
        return self.k.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def select(self, rows: Tensor) -> None:
        memories = rows // self.fold
        kept, counts = torch.unique_consecutive(memories, return_counts=True)
        fold = int(counts[0]) if len(counts) else 1
        if not bool((counts == fold).all()):
            kept, fold = memories, 1
        if len(kept) != len(self.k) or not torch.equal(kept, torch.arange(len(kept), device=kept.device)):
            self.sizes = [self.sizes[memory] for memory in kept.tolist()]
            size = max(self.sizes, default=0)
            self.k, self.v = self.k[kept, :, :size], self.v[kept, :, :size]
        self.fold = fold

    def fork(self, rows: Tensor | None, room: int) -> "Cross":
        """The memories themselves are shared: nothing writes to them."""
        made = Cross(self.k, self.v, self.fold)
        made.sizes = self.sizes
        if rows is not None:
            made.select(rows)
        return made

    def join(self, other: Self) -> None:
        """Of memories that differ in length the shorter are padded; how long each is, `State.given` says."""
        fold = gcd(self.fold, other.fold)
        size = max(self.size, other.size)
        self.sizes = [n for cell in (self, other) for n in cell.sizes for _ in range(cell.fold // fold)]

        def whole(x: Tensor, cell: Cross) -> Tensor:
            return F.pad(x.repeat_interleave(cell.fold // fold, 0), (0, 0, 0, size - x.shape[2]))

        self.k = torch.cat((whole(self.k, self), whole(other.k, other)))
        self.v = torch.cat((whole(self.v, self), whole(other.v, other)))
        self.fold = fold

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        position = self.k.shape[1] * (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        return len(memories) * max(memories, default=0) * position

    def mark(self) -> Any:
        return None

    def rewind(self, mark: Any, keep: int) -> int:
        return 0
