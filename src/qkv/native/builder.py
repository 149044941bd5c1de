"""Collecting the records of a program."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.masks import Mask
from qkv.native.library import ACTS, PAGE, Kind, NormKind, lanes
from qkv.native.tiles import Arena, store_of
from qkv.parts.block import LayerScale
from qkv.parts.linear import Linear
from qkv.parts.norm import BatchNorm, DyT, LayerNorm, RMSNorm

Fields: TypeAlias = dict[str, Any]


class Unlowered(Exception):
    """A part for which there is no kernel; the message names it."""


@dataclass(frozen=True)
class Read:
    """A buffer, and the norm with which it is read."""

    buffer: int
    norm: nn.Module | None = None


@dataclass(frozen=True)
class Add:
    """Where a result goes, and the buffer that is added to it."""

    buffer: int
    residual: int = -1


class Builder:
    """Collects records. A value that is a function of a number of positions is a table, made as long as it must be."""

    def __init__(self, arena: Arena, mask: Mask, wide_cache: bool) -> None:
        self.arena, self.mask, self.wide_cache = arena, mask, wide_cache
        self.ops: list[Fields] = []
        self.widths = [0, 0]
        self.named: dict[str, int] = {}
        self.tables: dict[Any, Callable[[int], Tensor]] = {}
        self.page, self.memory_page, self.state_bytes = 0, 0, 0
        self.runs: set[int] = set()
        """The bytes that a head's keys, or its values, take of a page."""
        self.memories: list[tuple[Any, int, int]] = []
        """Each cross-attention, with where its keys and values stand in a page."""

    def buffer(self, name: str, width: int) -> int:
        """The buffer of that name, at least so wide."""
        if name not in self.named:
            self.named[name] = len(self.widths)
            self.widths.append(0)
        at = self.named[name]
        self.widths[at] = max(self.widths[at], width)
        return at

    def add(self, kind: Kind, **fields: Any) -> None:
        self.ops.append({"kind": kind, **fields})

    def table(self, key: Any, make: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """A function of a number of positions; layers that give an equal key share the table that it makes."""
        return self.tables.setdefault(key, make)

    def floats(self, x: Tensor) -> Tensor:
        """A parameter as the kernels read it."""
        return x.detach().float().contiguous()

    # --- products ---

    def linear(
        self, layers: Sequence[Linear], read: Read, add: Add, *, act: str = "identity", gated: bool = False
    ) -> None:
        """Products of one input side by side; those whose weights are kept alike are one record."""
        at = 0
        for group in groups(layers) if not gated else [list(layers)]:
            if len({store_of(layer.weight) for layer in group}) > 1:
                raise Unlowered("a gate and what it multiplies are kept in different ways")
            for layer in group:
                if layer.adapters:
                    raise Unlowered("an adapter: merge it first")
            biases = [layer.bias for layer in group]
            bias = None if all(b is None for b in biases) else self.biases(group, gated)
            outputs = sum(len(layer.weight) for layer in group)
            self.product([layer.weight for layer in group], read, add, outputs, bias, act, gated, at)
            at += outputs

    def product(
        self, weights: Sequence[Tensor], read: Read, add: Add, outputs: int, bias: Tensor | None = None,
        act: str = "identity", gated: bool = False, at: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        store, inputs = store_of(weights[0]), weights[0].shape[1]
        self.add(
            Kind.LINEAR, **{"in": read.buffer}, out=add.buffer, residual=add.residual, out_at=at, inputs=inputs,
            outputs=outputs, store=store, weight=self.arena.tiles(weights, gated=gated), act=ACTS.index(act),
            gated=gated, **(norm_fields(self, read.norm) if read.norm is not None else {}),
            **({"bias": whole_tiles(bias)} if bias is not None else {}), **more,
        )  # fmt: skip

    def biases(self, layers: Sequence[Linear], gated: bool) -> Tensor:
        rows = [whole_tiles(torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias) for layer in layers]
        return torch.stack([row.view(-1, lanes()) for row in rows], 1).flatten() if gated else torch.cat(rows)

    def normalise(self, norm: nn.Module | None, source: int, add: Add) -> None:
        """norm(source); no norm copies."""
        fields = {"norm": NormKind.AFFINE} if norm is None else norm_fields(self, norm)
        self.add(Kind.NORM, **{"in": source}, out=add.buffer, residual=add.residual, inputs=self.widths[source],
                 **fields)  # fmt: skip

    # --- caches ---

    def own_cache(self, groups: int, width: int) -> tuple[int, int]:
        """Where in a page the keys and values of the next attention stand.

        An encoder is done with those of a layer before the next: all its layers share one place.
        """
        keys, values = cache_bytes(groups, width, self.wide_cache)
        self.runs |= {keys // groups, values // groups}
        if not self.mask.incremental:
            self.page = max(self.page, keys + values)
            return 0, keys
        at, self.page = self.page, self.page + keys + values
        return at, at + keys

    def state(self, floats: int) -> int:
        """Where in a text's state the next floats stand."""
        at, self.state_bytes = self.state_bytes, self.state_bytes + -(-floats * 4 // 64) * 64
        return at

    def memory_cache(self, body: Any) -> tuple[int, int]:
        """The same for a memory, whose keys and values another program writes."""
        keys, values = cache_bytes(body.groups, body.head_width, self.wide_cache)
        at, self.memory_page = self.memory_page, self.memory_page + keys + values
        self.memories.append((body, at, at + keys))
        return at, at + keys


def whole_tiles(bias: Tensor) -> Tensor:
    """Numbers of outputs as the kernels read them, with zeros up to whole tiles."""
    return F.pad(bias.detach().float(), (0, -len(bias) % lanes()))


def groups(layers: Sequence[Linear]) -> list[list[Linear]]:
    """Neighbours that can be one product: kept alike, whole tiles but for the last."""
    made: list[list[Linear]] = []
    for layer in layers:
        last = made[-1][-1] if made else None
        alike = last is not None and store_of(last.weight) == store_of(layer.weight) and len(last.weight) % lanes() == 0
        made[-1].append(layer) if alike else made.append([layer])
    return made


def norm_fields(build: Builder, norm: Any) -> Fields:
    spec: Any = getattr(norm, "spec", None)
    kind, eps, weight, bias = NormKind.AFFINE, 0.0, norm.weight, getattr(norm, "bias", None)
    match spec:
        case LayerNorm():
            kind, eps = NormKind.LAYER, spec.eps
        case RMSNorm():
            kind, eps, weight = NormKind.RMS, spec.eps, norm.weight + spec.offset
        case DyT():
            kind, eps = NormKind.TANH, float(norm.alpha)
        case BatchNorm():
            weight = norm.weight / (norm.running_var + norm.eps).sqrt()
            bias = norm.bias - norm.running_mean * weight
        case LayerScale():
            pass
        case _:
            raise Unlowered(f"the norm or gate {spec or type(norm).__name__}")
    made: Fields = {"norm": kind, "eps": eps, "norm_weight": build.floats(weight)}
    return made if bias is None else {**made, "norm_bias": build.floats(bias)}


def cache_bytes(groups: int, width: int, wide: bool) -> tuple[int, int]:
    """The bytes of a page's keys and of its values."""
    one = 4 if wide else 2
    return groups * PAGE * width * one, groups * PAGE * -(-width // lanes()) * lanes() * one
