"""Attention: self, masked self and cross; any number of key-value heads; any score, position and mask."""

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from qkv.context import Context, TileOf, View
from qkv.errors import QkvError
from qkv.masks import Causal, Full, Mask
from qkv.ops import attention
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.norm import Norm
from qkv.parts.position import Position
from qkv.parts.score import ScaledDot, Score
from qkv.spec import part, share
from qkv.state import KV, Cell, Cross, Rolling

LONG = 4096 * 4096
"""From this many scores on, a mask is asked tile by tile and no T×S tensor is made."""


@part("attention")
class Attention(Mixer):
    """softmax(score(W_q x, W_k m) + bias) W_v m, heads side by side, then W_o (Vaswani 2017).

    m is x itself, or the memory named `over`. kv_heads = heads is multi-head, 1 multi-query (Shazeer 2019), between
    grouped-query attention (Ainslie 2023). A layer's `mask` narrows the model's. `bias` is of all four products, or
    of those whose letters it names: "qkv".
    """

    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    over: str | None = None
    mask: Mask = Full()
    score: Score = ScaledDot()
    position: Position | None = None
    norm: Norm | None = None
    bias: bool | str = False
    dropout: float = 0.0

    def check(self) -> None:
        groups = self.heads if self.kv_heads is None else self.kv_heads
        if self.heads < 1 or groups < 1 or self.heads % groups:
            raise QkvError(f"{self.kv_heads} key-value heads do not divide {self.heads} heads")
        if self.head_width is not None and self.head_width < 1:
            raise QkvError(f"a head_width of {self.head_width} holds nothing; give at least 1")
        share(self, "dropout")
        if isinstance(self.bias, str) and not set(self.bias) <= set("qkvo"):
            raise QkvError(f"bias names products by the letters q, k, v and o, not {self.bias!r}")
        if self.over is not None and (self.mask != Full() or self.position is not None):
            raise QkvError("a memory has no positions: leave out mask and position where over is given")
        if self.norm is not None and self.norm.over_batch:
            raise QkvError("queries and keys cannot be normalised over the batch, whose padding they do not know")

    def build(self, width: int) -> Body:
        if self.head_width is None and width % self.heads:
            raise QkvError(f"{self.heads} heads do not divide the width {width}; change heads or give a head_width")
        return _Attention(self, width)


class _Attention(Body):
    def __init__(self, spec: Attention, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.groups = spec.kv_heads or spec.heads
        self.head_width = K = spec.head_width or width // spec.heads
        bias = spec.bias if isinstance(spec.bias, str) else "qkvo" * spec.bias
        self.q = Linear(width, spec.heads * K, bias="q" in bias, axes=("heads", "embed"))
        self.k = Linear(width, self.groups * K, bias="k" in bias, axes=("heads", "embed"))
        self.v = Linear(width, self.groups * K, bias="v" in bias, axes=("heads", "embed"))
        self.o = Linear(spec.heads * K, width, bias="o" in bias, axes=("embed", "heads"))
        self.q_norm = spec.norm.build(K) if spec.norm else None
        self.k_norm = spec.norm.build(K) if spec.norm else None
        self.score = spec.score.build(spec.heads, K)
        self.position = spec.position.build(spec.heads, K) if spec.position else None

    # --- before the layer loop ---

    def look(self) -> Hashable:
        position = self.position.look() if self.position is not None else None
        return self.spec.mask, self.spec.over, position, self.spec.heads, self.head_width

    def prepare(self, context: Context, cell: Cell | None, T: int) -> View:
        if self.spec.over is not None:
            return self.prepare_cross(context, cell)
        view = cell.plan(context, T) if isinstance(cell, KV) else View(seen=context.positions)
        assert view.seen is not None
        if cell is not None:
            self.spec.mask.refuse(context, T)
        mask, lengths = context.mask & self.spec.mask, context.lengths if cell is None else None
        queries, keys, long = context.positions[:, :, None], view.seen[:, None, :], T * view.seen.shape[1] > LONG
        plain = mask == Causal() and context.start is not None
        view.causal = plain and view.seen.shape[1] == T

        def allowed(rows: slice = slice(None), columns: slice = slice(None)) -> Tensor | None:
            k = keys[:, :, columns]
            seen = mask.allow(queries[:, rows], k, context)
            if lengths is not None and not mask.causal:
                real = k < lengths[:, None, None]
                seen = real if seen is None else seen & real
            return None if seen is None else seen[:, None]

        def bias(rows: slice = slice(None), columns: slice = slice(None)) -> Tensor | None:
            assert self.position is not None
            return self.position.bias(queries[:, rows], keys[:, :, columns], context)

        if not view.causal and not (plain and T == 1) and (mask != Full() or lengths is not None):
            view.mask = allowed if long else allowed()
        if self.position is not None:
            view.table = self.position.table(context.positions, context, self.q.weight.dtype)
            learned = any(True for _ in self.position.parameters())  # a function of tiles passes no gradient
            view.bias = bias if long and not learned and bias(slice(1), slice(1)) is not None else bias()
        return view

    def prepare_cross(self, context: Context, cell: Cell | None) -> View:
        """A memory is seen as far as it is real; every query of a row sees the same keys."""
        assert self.spec.over is not None
        lengths = context.given.get(f"{self.spec.over}_lengths")
        if lengths is None:
            return View()
        fold = cell.fold if isinstance(cell, Cross) else 1
        size = cell.k.shape[2] if isinstance(cell, Cross) else context.need(self.spec.over).shape[1]
        real = torch.arange(size, device=lengths.device) < lengths[::fold, None]
        return View(mask=real[:, None, None])

    # --- in the loop ---

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        if self.spec.over is not None:
            if self.spec.over not in given:
                raise QkvError(f"the state needs the memory {self.spec.over!r}: new_state(…, **model.encode(source))")
            return Cross(*self.keys_and_values(given[self.spec.over]))
        reach = self.spec.mask.reach
        slots = room if reach is None else Rolling.slots(reach, room)
        shape = batch, self.groups, slots + 1, self.head_width
        k, v = self.k.weight.new_zeros(shape), self.k.weight.new_zeros(shape)
        return KV(k, v) if reach is None else Rolling(k, v, reach)

    def split(self, x: Tensor) -> Tensor:
        """B T (heads × K) → B heads T K."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.split(self.k(memory)), self.split(self.v(memory))
        return (self.k_norm(k) if self.k_norm is not None else k), v

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        assert self.view is not None
        view = context.views[self.view]
        assert view is not None
        q = self.split(self.q(x))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if isinstance(cell, Cross):
            return self.o(self.read(q, cell, view, context))
        k, v = self.keys_and_values(x if self.spec.over is None else context.need(self.spec.over))
        if view.table is not None and self.position is not None:
            q, k = self.position.rotate(q, view.table), self.position.rotate(k, view.table)
        if isinstance(cell, KV):
            k, v = cell.write(k, v, context, view)
        return self.o(self.attend(q, k, v, view, context).transpose(1, 2).flatten(2))

    def read(self, q: Tensor, cell: Cross, view: View, context: Context) -> Tensor:
        """Cross-attention to a cached memory: rows that share it become further queries of one row."""
        B, H, T, K = q.shape
        q = q.unflatten(0, (-1, cell.fold)).transpose(1, 2).flatten(2, 3)
        out = self.attend(q, cell.k, cell.v, view, context, cell.fold)
        return out.unflatten(2, (cell.fold, T)).permute(0, 2, 3, 1, 4).reshape(B, T, H * K)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: View, context: Context, fold: int = 1) -> Tensor:
        """q: B H T K, k and v: B G S K → B H T K, by the cheapest form that gives what is asked for."""
        dot, dropout = self.score.dot, self.spec.dropout if self.training else 0.0
        if dot is None or context.wants("weights"):
            scale, softcap = (dot.scale, dot.softcap) if dot else (None, None)
            seen = attention.naive(
                *(q, k, v), mask=whole(view.mask), bias=whole(view.bias), causal=view.causal,
                scale=scale, softcap=softcap, dropout=dropout, score=None if dot else self.score,
            )  # fmt: skip
            weights = seen.weights.unflatten(2, (fold, -1)).transpose(1, 2).flatten(0, 1)
            context.emit("weights", weights, tokens=(2, 3) if self.spec.over is None else (2,))
            return seen.out
        if dot.softcap is not None or dropout or callable(view.mask) or callable(view.bias):
            # torch's fast kernel knows none of these
            return attention.tiled(
                *(q, k, v), mask=view.mask, bias=view.bias, causal=view.causal,
                scale=dot.scale, softcap=dot.softcap, dropout=dropout,
            )  # fmt: skip
        return attention.fused(q, k, v, mask=view.mask, bias=view.bias, causal=view.causal, scale=dot.scale)


def whole(x: Tensor | TileOf | None) -> Tensor | None:
    """What a function says of a tile, for all queries and keys at once."""
    return x(slice(None), slice(None)) if callable(x) else x
