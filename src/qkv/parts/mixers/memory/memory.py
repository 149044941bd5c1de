"""A memory of matrices: linear attention and all that came of it, which differ in how it decays and is written."""

from collections.abc import Hashable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops import recall
from qkv.ops.precision import wide
from qkv.parts.activation import activation
from qkv.parts.convolution import ShortConvolution
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.memory.decay import Decay, Project, by_head
from qkv.parts.mixers.memory.feature import Feature
from qkv.parts.mixers.memory.rule import Add, Rule, Write, repeat
from qkv.parts.mixers.recurrence import Past, Recurrence
from qkv.parts.norm import Norm, RMSNorm
from qkv.parts.position import Position
from qkv.spec import part
from qkv.state import Cell, Recurrent


@part("memory")
class Memory(Mixer):
    """W_o (norm(o) ⊙ act(W_g x)), where each head reads o from a matrix S that it has written so far.

    S_t = rule(e^{g_t} ⊙ S_{t−1}, k_t, v_t) and o_t = S_tᵀ q_t / √K: the memory decays, is written, then read. The
    `decay` g is a constant, or decided by the token; the `rule` adds, or replaces. q, k and v are W x, each with a
    causal convolution over `conv` tokens if it is given, and then silu for v; q and k go through the `feature` and are
    turned by the `position`. `groups` of heads share q and k. The `norm` is over each head; `gate` names an act, whose
    W_g goes through `gate_rank` channels if it is given. Left out, `key_width` is C / heads and `value_width` the same.
    Where the model's mask lets a token not see the one before it, a document begins and the memory is empty.
    """

    heads: int
    groups: int | None = None
    key_width: int | None = None
    value_width: int | None = None
    decay: Decay | None = None
    rule: Rule = Add()
    feature: Feature | None = None
    conv: int | None = None
    position: Position | None = None
    norm: Norm | None = RMSNorm()
    gate: str | None = None
    gate_rank: int | None = None

    def check(self) -> None:
        sizes = self.heads, self.groups, self.key_width, self.value_width, self.conv, self.gate_rank
        if any(n is not None and n < 1 for n in sizes):
            raise QkvError("heads, groups, key_width, value_width, conv and gate_rank are each at least 1")
        if self.heads % (self.groups or self.heads):
            raise QkvError(f"{self.groups} groups do not divide {self.heads} heads")
        if self.norm is not None and self.norm.over_batch:
            raise QkvError("what heads read cannot be normalised over the batch, whose padding they do not know")
        if self.gate is not None:
            activation(self.gate)

    def build(self, width: int) -> Body:
        if self.key_width is None and width % self.heads:
            raise QkvError(f"{self.heads} heads do not divide the width {width}; change heads or give a key_width")
        return _Memory(self, width)


class _Memory(Recurrence):
    def __init__(self, spec: Memory, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.groups = spec.groups or spec.heads
        self.key_width = K = spec.key_width or width // spec.heads
        self.value_width = V = spec.value_width or K
        keys, values, tied = self.groups * K, spec.heads * V, spec.decay is not None and spec.decay.ties
        self.q = Linear(width, keys, axes=("heads", "embed"))
        self.k = None if tied else Linear(width, keys, axes=("heads", "embed"))
        self.v = Linear(width, values, axes=("heads", "embed"))
        self.q_conv = ShortConvolution(keys, spec.conv, bias=False) if spec.conv else None
        self.k_conv = ShortConvolution(keys, spec.conv, bias=False) if spec.conv and not tied else None
        self.v_conv = ShortConvolution(values, spec.conv, bias=False) if spec.conv else None
        self.feature = spec.feature.build() if spec.feature else None
        self.position = spec.position.build(self.groups, K) if spec.position else None
        self.decay = spec.decay.build(width, self.groups if tied else spec.heads, K) if spec.decay else None
        self.rule = spec.rule.build(width, spec.heads)
        self.norm = spec.norm.build(V) if spec.norm else None
        self.gate = Project(width, values, spec.gate_rank, None) if spec.gate else None
        self.o = Linear(values, width, axes=("embed", "heads"))

    # --- before the layer loop ---

    def look(self) -> Hashable:
        if self.position is None:
            return super().look()
        return "memory", self.position.look(), self.groups, self.key_width

    def prepare(self, context: Context, cell: Cell | None, T: int) -> Past:
        past = super().prepare(context, cell, T)
        if self.position is not None:
            one = context.positions[:1, :1, None]
            if self.position.bias(one, one, context) is not None:
                raise QkvError(f"a memory has no scores to add to: {self.position.spec.kind} does not fit, rotary does")
            past.table = self.position.table(context.positions, context, self.q.weight.dtype)
        return past

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        weight = self.q.weight
        shape = batch, self.spec.heads, self.key_width, self.value_width + self.spec.rule.column
        taps = {name: conv.no_taps(batch) for name, conv in self.convolutions().items()}
        return Recurrent(S=weight.new_zeros(shape, dtype=wide(weight)), **taps, **self.rule.new(batch))

    def convolutions(self) -> dict[str, ShortConvolution]:
        named = {"q": self.q_conv, "k": self.k_conv, "v": self.v_conv}
        return {name: conv for name, conv in named.items() if conv is not None}

    # --- in the loop ---

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        past, valid, held = self.past(context), context.valid(), cell.now if isinstance(cell, Recurrent) else {}
        now: dict[str, Tensor] = {}

        def stream(name: str, product: Linear, heads: int) -> Tensor:
            """W x and its convolution; B T C → B heads T K."""
            y, conv = product(x), self.convolutions().get(name)
            if conv is not None:
                convolved = conv(y, held.get(name), context.lengths, past.ages)
                y, now[name] = convolved.out, convolved.taps
            return by_head(y, heads)

        q, v = self.mapped(stream("q", self.q, self.groups)), stream("v", self.v, self.spec.heads)
        v = v if self.v_conv is None else F.silu(v)
        g = None if self.decay is None else self.decay(x)
        if self.k is not None:
            k = self.mapped(stream("k", self.k, self.groups))
        else:
            assert g is not None
            k, g = -torch.expm1(g), repeat(g, self.spec.heads)
        if self.position is not None:
            q, k = (self.position.rotate(y, past.table) for y in (q, k))
        if valid is not None:  # what stands in padding may be anything: 0 · NaN is NaN
            k, v = (y.masked_fill(~valid[:, None, :, None], 0) for y in (k, v))
        write = self.rule(x, k, bounded(g, v, past.first(), valid), valid, held)
        y, now["S"] = self.read(q * self.key_width**-0.5, v, write, held.get("S"), context)
        if isinstance(cell, Recurrent):
            cell.now = now | write.held
        y = y.to(x.dtype).transpose(1, 2)
        y = (y if self.norm is None else self.norm(y)).flatten(2)
        if self.gate is not None and self.spec.gate is not None:
            y = y * activation(self.spec.gate)(self.gate(x)).to(y.dtype)
        return self.o(y)

    def mapped(self, x: Tensor) -> Tensor:
        return x if self.feature is None else self.feature(x)

    def read(self, q: Tensor, v: Tensor, write: Write, S: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """q: B G T K, v: B H T V → what is read (B H T V), and the memory at the end."""
        q, v = repeat(q, write.k.shape[1]), v.to(wide(v))
        values = F.pad(v, (0, 1), value=1.0) if write.divide else v
        found = recall.chunked(q, write.k, values, write.g, write.beta, S)
        out, total = found.out[..., : v.shape[-1]], found.out[..., v.shape[-1] :]
        if context.wants("weights"):
            weights = recall.weights(repeat(q, v.shape[1]), repeat(write.k, v.shape[1]), write.g, write.beta)
            context.emit("weights", write.divide(weights, total) if write.divide else weights, tokens=(2, 3))
        return (write.divide(out, total) if write.divide else out), found.state


def bounded(g: Tensor | None, v: Tensor, first: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The gates, −∞ where a document begins, 0 where there is no token; None or a constant where there is neither."""
    if first is None and (g is None or valid is None):
        return g
    if g is None or g.dim() == 1:
        g = (v.new_zeros(1, dtype=wide(v)) if g is None else g)[:, None].expand(v.shape[:3])
    for where, value in ((first, -torch.inf), (None if valid is None else ~valid, 0.0)):
        if where is not None:
            g = g.masked_fill(where[:, None, :, None] if g.dim() == 4 else where[:, None], value)
    return g
