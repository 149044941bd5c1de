"""The keys and values that an attention has seen."""

from typing import Any

import torch
from torch import Tensor

from qkv.context import Context, View


class KV:
    """Keys B G S K and values B G S V; the slot of a position is the position.

    One slot more than there is room for takes what lies beyond a row's end. Nothing is ever cleared: what may be seen
    follows from positions, so that going back costs nothing and a slot is overwritten when its position comes again.
    """

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v

    @property
    def room(self) -> int:
        return self.k.shape[2] - 1

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k, "v": self.v}

    def select(self, rows: Tensor) -> None:
        self.k, self.v = self.k[rows], self.v[rows]

    def mark(self) -> Any:
        return None

    def rewind(self, mark: Any, keep: int) -> int:
        return 0

    def plan(self, context: Context, T: int) -> View:
        """The positions that will be seen once the next T tokens are written, and the slots that they go to."""
        device = self.k.device
        if context.start is not None:
            return View(seen=torch.arange(context.start + T, device=device)[None])
        return View(seen=torch.arange(self.room, device=device)[None], slots=context.positions.clamp(max=self.room))

    def write(self, k: Tensor, v: Tensor, context: Context, view: View) -> tuple[Tensor, Tensor]:
        """Add the keys and values of T tokens (B G T K and V) → all that can be seen."""
        if view.slots is None:
            assert context.start is not None
            end = context.start + k.shape[2]
            self.k[:, :, context.start : end], self.v[:, :, context.start : end] = k, v
            return self.k[:, :, :end], self.v[:, :, :end]
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[rows, :, view.slots], self.v[rows, :, view.slots] = k.transpose(1, 2), v.transpose(1, 2)
        return self.k[:, :, :-1], self.v[:, :, :-1]
