"""The slot `position` of an attention: what it may do, and how layers share one."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.spec import Spec, nearest, part


class Position(Spec):
    """Tells an attention where its tokens stand."""

    def build(self, heads: int, head_width: int) -> "Positional":
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Positional(nn.Module):
    """Three places to act; each does nothing unless overridden."""

    def __init__(self, spec: Position) -> None:
        super().__init__()
        self.spec = spec

    def look(self) -> Hashable:
        """Attentions whose positions look alike share one view; learned ones do only where they are the same module."""
        return id(self) if any(True for _ in self.parameters()) else self.spec

    def table(self, positions: Tensor, context: Context, dtype: torch.dtype = torch.float32) -> Any:
        """What `rotate` needs for tokens at these positions (1|B T) in a model of this dtype; None is no rotation."""
        return None

    def rotate(self, x: Tensor, table: Any) -> Tensor:
        """Queries or keys (B H T K), turned."""
        return x

    def bias(self, queries: Tensor, keys: Tensor, context: Context) -> Tensor | None:
        """Positions (1|B T 1 and 1|B 1 S) → what is added to the scores, broadcasting to B H T S."""
        return None


@part("shared")
class Shared(Position):
    """The position of that name in the stack's `shared`, one module for all the layers that name it (T5's table)."""

    name: str

    def build(self, heads: int, head_width: int) -> Positional:
        return SharedPosition(self, heads, head_width)


class SharedPosition(Positional):
    """Stands in a layer for a module that the stack owns; `bind` makes the connection without owning it twice."""

    def __init__(self, spec: Shared, heads: int, head_width: int) -> None:
        super().__init__(spec)
        self.name, self.shape = spec.name, (heads, head_width)
        self.target: list[Positional] = []

    def bind(self, specs: dict[str, Position], made: nn.ModuleDict, shapes: dict[str, tuple[int, int]]) -> None:
        """Find the module of this name in `made`, or make it for this layer's heads."""
        if self.name not in specs:
            raise QkvError(f"no shared position is called {self.name!r}{nearest(self.name, specs)}")
        if self.name not in made:
            made[self.name], shapes[self.name] = specs[self.name].build(*self.shape), self.shape
        if shapes[self.name] != self.shape:
            both = f"{shapes[self.name]} and {self.shape}"
            raise QkvError(f"layers that share the position {self.name!r} have (heads, head width) {both}")
        target = made[self.name]
        assert isinstance(target, Positional)
        self.target = [target]  # in a list, so that torch does not register it here as well

    def look(self) -> Hashable:
        return self.target[0].look()

    def table(self, positions: Tensor, context: Context, dtype: torch.dtype = torch.float32) -> Any:
        return self.target[0].table(positions, context, dtype)

    def rotate(self, x: Tensor, table: Any) -> Tensor:
        return self.target[0].rotate(x, table)

    def bias(self, queries: Tensor, keys: Tensor, context: Context) -> Tensor | None:
        return self.target[0].bias(queries, keys, context)
