"""Masks as values: each says which keys a query position may see; they combine with `&` and `|`.

A model's mask, a layer's mask and padding are conjoined, so that a layer can only narrow what the model allows.
Positions are absolute and the same function serves a whole sequence, one step of decoding and a tile of either.
"""

import dataclasses as dc
from typing import TYPE_CHECKING

from torch import Tensor

from qkv.errors import QkvError
from qkv.spec import Spec, part

if TYPE_CHECKING:
    from qkv.context import Context


@dc.dataclass(frozen=True)
class Reach:
    """Of the keys before a query those that it may see at most: the `first` of its row and the last `behind`."""

    first: int
    behind: int


class Mask(Spec):
    """Which keys a query may see."""

    @property
    def causal(self) -> bool:
        """Whether no key after the query is ever visible, so that padding at the right end of a row needs no mask."""
        return False

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor | None:
        """Positions `queries` (1|B T 1) and `keys` (1|B 1 S) → booleans that broadcast to B T S; None is all."""
        return None

    @property
    def incremental(self) -> bool:
        """Whether a cache can serve it: what a query sees is complete once the query has been fed."""
        return self.causal

    @property
    def reach(self) -> Reach | None:
        """How far back any query sees, so that a cache need keep no more; None is as far as the row goes."""
        return None

    def refuse(self, context: "Context", T: int) -> None:
        """Raise `QkvError` where the next T tokens cannot be fed to a cache by themselves."""

    def __and__(self, other: "Mask") -> "Mask":
        return other if self in (Full(), other) else self if other == Full() else All((self, other))

    def __or__(self, other: "Mask") -> "Mask":
        return Full() if Full() in (self, other) else Any((self, other))


@part("full")
class Full(Mask):
    """Every query sees every key (an encoder)."""


@part("causal")
class Causal(Mask):
    """A query sees itself and what came before: k ≤ q (a decoder)."""

    @property
    def causal(self) -> bool:
        return True

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        return keys <= queries


@part("window")
class Window(Mask):
    """Only keys nearer than `size`: |q − k| < size. With `Causal()` that is the last `size` tokens, itself included."""

    size: int

    def check(self) -> None:
        if self.size < 1:
            raise QkvError(f"a window of {self.size} sees nothing; give at least 1")

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        return (queries - keys).abs() < self.size

    @property
    def reach(self) -> Reach:
        return Reach(0, self.size - 1)


@part("global")
class Global(Mask):
    """The first n tokens see all and are seen by all: q < n or k < n.

    `Window(w) | Global(n)` is Longformer's (Beltagy 2020); `Causal() & (Window(w) | Global(n))` keeps the first n as
    sinks of attention beside the window (Xiao 2023, StreamingLLM).
    """

    n: int

    def check(self) -> None:
        if self.n < 1:
            raise QkvError(f"{self.n} global tokens are none; give at least 1")

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        return (queries < self.n) | (keys < self.n)

    @property
    def reach(self) -> Reach:
        return Reach(self.n, 0)


@part("marked")
class Marked(Mask):
    """The tokens that the tensor `given` (B T booleans) marks see all and are seen by all (Beltagy 2020)."""

    given: str = "marks"

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        marked = context.packed(self.given, (1,)).bool()
        return marked[:, queries[0, :, 0], None] | marked[:, None, keys[0, 0, :]]

    def refuse(self, context: "Context", T: int) -> None:
        raise QkvError("marked tokens, which see what is to come, cannot be decoded with a cache: use Global(n)")


@part("prefix")
class Prefix(Mask):
    """Every query sees the first n keys of its row, n from the tensor `given` (B): `Causal() | Prefix()` is prefix-LM.

    Dong 2019 (UniLM), Raffel 2020 (T5).
    """

    given: str = "prefix"

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        return keys < context.need(self.given).view(-1, 1, 1)

    @property
    def incremental(self) -> bool:
        return True

    def refuse(self, context: "Context", T: int) -> None:
        start, prefix = context.positions[:, 0], context.need(self.given)
        fed = T if context.lengths is None else context.lengths
        if bool(((start < prefix) & (start + fed < prefix)).any()):
            raise QkvError("a chunk ends inside a bidirectional prefix: feed each row's whole prefix in one call")


@part("same")
class Same(Mask):
    """Only keys of the same document: s[q] = s[k], s the tensor `given` (B T) (packed documents)."""

    given: str = "segments"

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        segments = context.packed(self.given, (1,))
        return segments[:, queries[0, :, 0], None] == segments[:, None, keys[0, 0, :]]

    def refuse(self, context: "Context", T: int) -> None:
        raise QkvError("packed documents cannot be decoded with a cache: give each document a row of its own")


@part("edges")
class Edges(Mask):
    """Only keys joined to the query by an edge of a graph: the tensor `given` (1|B T T), true where q may see k.

    Self-attention on a complete graph becomes a graph network (Veličković 2018).
    """

    given: str = "edges"

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor:
        edges = context.packed(self.given, (1, 2))
        return edges[:, queries[0, :, 0, None], keys[0, 0, None, :]]

    def refuse(self, context: "Context", T: int) -> None:
        raise QkvError("a graph cannot be decoded with a cache: give the model all of its nodes at once")


@part("all")
class All(Mask):
    """What every one of the masks allows; written `a & b`."""

    masks: tuple[Mask, ...]

    @property
    def causal(self) -> bool:
        return any(mask.causal for mask in self.masks)

    @property
    def incremental(self) -> bool:
        return any(mask.incremental for mask in self.masks)

    @property
    def reach(self) -> Reach | None:
        bounds = [bound for mask in self.masks if (bound := mask.reach)]
        # a key that all allow is among the first of one of them, or near enough for each
        return Reach(max(b.first for b in bounds), min(b.behind for b in bounds)) if bounds else None

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor | None:
        allowed: Tensor | None = None
        for mask in self.masks:
            one = mask.allow(queries, keys, context)
            if one is not None:
                allowed = one if allowed is None else allowed & one
        return allowed

    def refuse(self, context: "Context", T: int) -> None:
        for mask in self.masks:
            mask.refuse(context, T)


@part("any")
class Any(Mask):
    """What at least one of the masks allows; written `a | b`."""

    masks: tuple[Mask, ...]

    def check(self) -> None:
        if not self.masks:
            raise QkvError("of no masks none allows anything: give at least one")

    @property
    def causal(self) -> bool:
        return all(mask.causal for mask in self.masks)

    @property
    def incremental(self) -> bool:
        return all(mask.incremental for mask in self.masks)

    @property
    def reach(self) -> Reach | None:
        bounds = [bound for mask in self.masks if (bound := mask.reach)]
        if not bounds or len(bounds) < len(self.masks):
            return None
        return Reach(max(b.first for b in bounds), max(b.behind for b in bounds))

    def allow(self, queries: Tensor, keys: Tensor, context: "Context") -> Tensor | None:
        allowed: Tensor | None = None
        for mask in self.masks:
            one = mask.allow(queries, keys, context)
            if one is None:
                return None
            allowed = one if allowed is None else allowed | one
        return allowed

    def refuse(self, context: "Context", T: int) -> None:
        for mask in self.masks:
            mask.refuse(context, T)
