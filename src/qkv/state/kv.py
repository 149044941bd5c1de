"""The keys and values that an attention has seen."""

from collections.abc import Sequence
from typing import Any, Self

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

    def fork(self, rows: Tensor | None, room: int) -> "KV":
        """Copies, since slots are written in place; of a larger room only the first slots."""
        chosen, kept = slice(None) if rows is None else rows, min(room, self.room)

        def copied(x: Tensor) -> Tensor:
            made = x.new_zeros(len(x) if rows is None else len(rows), x.shape[1], room + 1, x.shape[3])
            made[:, :, :kept] = x[chosen, :, :kept]
            return made

        return KV(copied(self.k), copied(self.v))

    def join(self, other: Self) -> None:
        self.k, self.v = torch.cat((self.k, other.k)), torch.cat((self.v, other.v))

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        """Rows of one state have the room of the longest."""
        slot = self.k.shape[1] * (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        return len(rooms) * (max(rooms, default=0) + 1) * slot

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
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)  # under autocast they are narrower
        if view.slots is None:
            assert context.start is not None
            end = context.start + k.shape[2]
            self.k[:, :, context.start : end], self.v[:, :, context.start : end] = k, v
            return self.k[:, :, :end], self.v[:, :, :end]
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[rows, :, view.slots], self.v[rows, :, view.slots] = k.transpose(1, 2), v.transpose(1, 2)
        return self.k[:, :, :-1], self.v[:, :, :-1]
