"""What one forward pass knows besides x: positions, mask, lengths, what was given, the prepared views, and the tap.

Rows are packed to the left: row b holds lengths[b] tokens and then padding, so that the position of a token is the
number of tokens before it, whatever side the caller's padding was on.
"""

import dataclasses as dc
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.masks import Full, Mask
from qkv.spec import matches

TileOf: TypeAlias = Callable[[slice, slice], Tensor | None]
"""(rows, columns) → what stands for these queries and keys."""


@dc.dataclass(eq=False, slots=True)
class View:
    """What attention needs besides x and its cell; the same for every layer that looks in the same way."""

    seen: Tensor | None = None
    """1|B S: the positions of the keys."""
    slots: Tensor | None = None
    """1|B T: where the cell writes the new keys; None is the next ones in a row."""
    ends: Tensor | None = None
    """1|B: how long each row is when this pass is over, where the cell must know."""
    mask: Tensor | TileOf | None = None
    """Booleans that broadcast to B H T S, true where a key may be seen; or a function of a tile, for long sequences."""
    causal: bool = False
    """Query i sees key j where j ≤ i, and `mask` is None."""
    bias: Tensor | TileOf | None = None
    """Added to the scores; broadcasts to B H T S; or a function of a tile, if nothing in it is learned."""
    table: Any = None
    """The position's rotation table for the tokens of this pass."""


class Tap:
    """Keeps what parts emit during a forward pass, where the dotted path matches one of the patterns.

    >>> tap = Tap("**.attn.weights")
    >>> model(ids, tap=tap)
    >>> tap["stack.0.attn.weights"]        # B H T S
    """

    def __init__(self, *patterns: str) -> None:
        self.patterns = patterns
        self.values: dict[str, Tensor] = {}

    def __getitem__(self, path: str) -> Tensor:
        if path not in self.values:
            raise QkvError(f"the tap holds nothing at {path!r}; it holds: {', '.join(self.values) or 'nothing'}")
        return self.values[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def find(self, pattern: str) -> dict[str, Tensor]:
        """The values whose path matches, in the order in which they were emitted."""
        return {path: value for path, value in self.values.items() if matches(pattern, path)}


class Recording:
    """One forward pass seen by a tap. Sealed when the pass returns: what checkpointing recomputes later is not kept."""

    def __init__(self, tap: Tap, order: Tensor | None) -> None:
        self.tap, self.order, self.sealed = tap, order, False

    def wants(self, path: str) -> bool:
        return any(matches(pattern, path) for pattern in self.tap.patterns)

    def keep(self, path: str, value: Tensor, tokens: tuple[int, ...]) -> None:
        if self.sealed:
            return
        if self.order is not None:
            back = self.order.argsort(1)
            for dim in tokens:
                if value.shape[dim] == back.shape[1]:
                    value = take(value, back, dim)
        self.tap.values[path] = value


@dc.dataclass(eq=False, slots=True)
class Context:
    """What one forward knows besides x (B T C)."""

    positions: Tensor
    """1|B T, absolute."""
    mask: Mask = dc.field(default_factory=Full)
    start: int | None = 0
    """The first position, where it is the same for all rows and known on the host; else None."""
    lengths: Tensor | None = None
    """B: how many of the T tokens are real; None is all."""
    order: Tensor | None = None
    """B T: the caller's index of each packed token; None where rows came packed."""
    given: Mapping[str, Tensor] = dc.field(default_factory=dict)
    """Named tensors of the caller and of the wiring: a memory and its lengths, segments, a prefix."""
    views: list[View | None] = dc.field(default_factory=list)
    recording: Recording | None = None
    path: str = ""

    def inside(self, name: str) -> "Context":
        """The context of a part's child; only where a tap listens does a path cost anything."""
        if self.recording is None:
            return self
        return dc.replace(self, path=f"{self.path}.{name}" if self.path else name)

    def wants(self, name: str) -> bool:
        """Whether a tap asks for what this part would emit under `name`."""
        return self.recording is not None and self.recording.wants(f"{self.path}.{name}")

    def emit(self, name: str, value: Tensor, tokens: tuple[int, ...] = (1,)) -> None:
        """Offer a value to the tap; `tokens` are its dimensions that run over the tokens of this pass."""
        if self.recording is not None and self.wants(name):
            self.recording.keep(f"{self.path}.{name}", value, tokens)

    def valid(self) -> Tensor | None:
        """B T: which tokens are real; None is all."""
        if self.lengths is None:
            return None
        return torch.arange(self.positions.shape[1], device=self.positions.device) < self.lengths[:, None]

    def need(self, name: str) -> Tensor:
        """A tensor that the caller must have given."""
        if name not in self.given:
            raise QkvError(f"this model needs the tensor {name!r}: pass {name}=… with the call")
        return self.given[name]

    def packed(self, name: str, tokens: tuple[int, ...]) -> Tensor:
        """A given tensor, its token dimensions brought into the order of the packed rows."""
        value = self.need(name)
        if self.order is not None:
            for dim in tokens:
                value = take(value, self.order, dim)
        return value


def pack(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans B T with padding anywhere → (the order that brings each row's tokens to the left, B T; lengths, B)."""
    return valid.int().argsort(dim=1, descending=True, stable=True), valid.sum(1)


def take(x: Tensor, order: Tensor, dim: int = 1) -> Tensor:
    """Reorder dimension `dim` of x by each row's own order (B T)."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = order.shape
    size = list(x.shape)
    size[0], size[dim] = order.shape
    x = x.expand(size[0], *x.shape[1:])
    return x.gather(dim, order.view(shape).expand(size))
