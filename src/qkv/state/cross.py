"""The projected memory that a cross-attention reads."""

from typing import Any

import torch
from torch import Tensor


class Cross:
    """Keys and values of M memories (M G S K and V), projected once, read by B rows.

    `fold` consecutive rows read the same memory (the beams of one sentence), so that the memory is neither copied nor
    read again for each of them; choosing among those rows costs nothing.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v, self.fold = k, v, 1

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def select(self, rows: Tensor) -> None:
        memories = rows // self.fold
        kept, counts = torch.unique_consecutive(memories, return_counts=True)
        fold = int(counts[0]) if len(counts) else 1
        if not bool((counts == fold).all()):
            kept, fold = memories, 1
        if len(kept) != len(self.k) or not torch.equal(kept, torch.arange(len(kept), device=kept.device)):
            self.k, self.v = self.k[kept], self.v[kept]
        self.fold = fold

    def mark(self) -> Any:
        return None

    def rewind(self, mark: Any, keep: int) -> int:
        return 0
