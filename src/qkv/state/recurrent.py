"""What a recurrence carries from token to token."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


class Recurrent:
    """Named tensors (B …), replaced as a whole at each call and never edited, so that a mark is a few references."""

    def __init__(self, **now: Tensor) -> None:
        self.now = now

    def tensors(self) -> dict[str, Tensor]:
        return self.now

    def select(self, rows: Tensor) -> None:
        self.now = {name: value[rows] for name, value in self.now.items()}

    def fork(self, rows: Tensor | None, room: int) -> "Recurrent":
        return Recurrent(**(self.now if rows is None else {name: value[rows] for name, value in self.now.items()}))

    def join(self, other: Self) -> None:
        self.now = {name: torch.cat((value, other.now[name])) for name, value in self.now.items()}

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        return len(rooms) * sum(math.prod(value.shape[1:]) * value.element_size() for value in self.now.values())

    def mark(self) -> dict[str, Tensor]:
        return self.now

    def rewind(self, mark: dict[str, Tensor], keep: int) -> int:
        """Back to the mark itself: a recurrence cannot be run backwards, so all `keep` tokens are fed again."""
        self.now = mark
        return keep
