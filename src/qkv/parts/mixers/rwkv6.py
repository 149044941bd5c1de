"""RWKV-6, both halves of a layer: what mixes time, and what mixes channels with the token before (Peng 2024, Finch)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops import recall
from qkv.ops.precision import wide
from qkv.parts.convolution import Preceded, precede
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.memory.decay import by_head
from qkv.parts.mixers.recurrence import Past, Recurrence
from qkv.spec import part
from qkv.state import Cell, Recurrent

STREAMS = 5
"""The query r, the decay w, k, v, and the gate g: each mixes a token with the one before in its own way."""


@part("rwkv6")
class Rwkv6(Mixer):
    """W_o (norm(o) ⊙ silu(W_g x^g)), o_t = (S_{t−1} + (u ⊙ k_t) v_tᵀ)ᵀ r_t, S_t = diag(e^{g_t}) S_{t−1} + k_t v_tᵀ.

    r, k and v are W x^r, W x^k and W x^v; g = −e^{w}, w = b + B tanh(A x^w), through `decay_rank` channels. The token
    writes after it has read, and counts `u` times for itself. Each x^s is between a token and the one before it,
    x^s = x + (x' − x) ⊙ (μ^s + B^s tanh(A^s (x + (x' − x) ⊙ μ))), through `mix_rank` channels. The norm is over each
    head.
    """

    heads: int
    mix_rank: int = 32
    decay_rank: int = 64
    eps: float = 64e-5

    def check(self) -> None:
        if min(self.heads, self.mix_rank, self.decay_rank) < 1:
            raise QkvError("heads, mix_rank and decay_rank are each at least 1")

    def build(self, width: int) -> Body:
        if width % self.heads:
            raise QkvError(f"{self.heads} heads do not divide the width {width}; change heads")
        return _Rwkv6(self, width)


class Shifting(Recurrence):
    """A recurrence that looks at the token before; its cell holds that token as `x`."""

    def shift(self, x: Tensor, context: Context, past: Past, held: Mapping[str, Tensor]) -> Preceded:
        """x: B T C → the token before each one, zeros where there is none, and the last real one."""
        before = precede(x, held.get("x", x.new_zeros(len(x), 1, x.shape[-1])), context.lengths)
        first, previous = past.first(), before.all[:, :-1]
        return Preceded(previous if first is None else previous.masked_fill(first[..., None], 0), before.last)


class _Rwkv6(Shifting):
    undecayed = "mix", "u"

    def __init__(self, spec: Rwkv6, width: int) -> None:
        super().__init__()
        self.spec, K = spec, width // spec.heads
        self.mix_all, self.mix = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(STREAMS, width))
        self.mix_down = nn.Parameter(torch.zeros(STREAMS * spec.mix_rank, width))
        self.mix_up = nn.Parameter(torch.empty(width, STREAMS * spec.mix_rank).uniform_(-0.01, 0.01))
        self.decay = nn.Parameter(torch.linspace(-6, -1, K).repeat(spec.heads))
        self.decay_down = Linear(width, spec.decay_rank, axes=("rank", "embed"))
        self.decay_up = Linear(spec.decay_rank, width, axes=("heads", "rank"))
        self.u = nn.Parameter(torch.linspace(1, 0, K).repeat(spec.heads, 1))
        self.r, self.k, self.v, self.g, self.o = (Linear(width, width, axes=("heads", "embed")) for _ in range(5))
        self.o.axes = ("embed", "heads")
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        H, K = self.u.shape
        S = self.u.new_zeros(batch, H, K, K, dtype=wide(self.u))
        return Recurrent(S=S, x=self.u.new_zeros(batch, 1, H * K))

    def streams(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """x^r, x^w, x^k, x^v, x^g, each B T C."""
        back = previous - x
        low = torch.tanh(F.linear(x + back * self.mix_all, self.mix_down)).unflatten(-1, (STREAMS, -1))
        found = low.transpose(1, 2) @ self.mix_up.unflatten(1, (STREAMS, -1)).permute(1, 2, 0)
        return (x[:, None] + back[:, None] * (self.mix[:, None] + found)).unbind(1)

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        past, valid, held = self.past(context), context.valid(), cell.now if isinstance(cell, Recurrent) else {}
        before = self.shift(x, context, past, held)
        r, w, k, v, gate = self.streams(x, before.all)
        first, H = past.first(), self.spec.heads
        w = self.decay_up(torch.tanh(self.decay_down(w)))
        g = by_head(-(self.decay + w.to(wide(w))).clamp(max=80).exp(), H)  # e^80 forgets all, and has gradients
        r, k, v = by_head(self.r(r), H), by_head(self.k(k), H), by_head(self.v(v), H)
        if first is not None:
            g = g.masked_fill(first[:, None, :, None], -torch.inf)
        if valid is not None:
            g, k, v = (y.masked_fill(~valid[:, None, :, None], 0) for y in (g, k, v))
        read = recall.bonus(r, k, v, g, self.u, held.get("S"), first)
        if context.wants("weights"):
            own = torch.eye(x.shape[1], dtype=g.dtype, device=g.device).expand(*g.shape[:3], -1)
            context.emit("weights", recall.bonus(r, k, own, g, self.u, None, first).out, tokens=(2, 3))
        if isinstance(cell, Recurrent):
            cell.now = {"S": read.state, "x": before.last}
        y = F.group_norm(
            read.out.transpose(1, 2).flatten(0, 1).flatten(1), H, self.norm_weight, self.norm_bias, self.spec.eps
        )
        return self.o(y.view_as(x) * F.silu(self.g(gate)))


@part("channel-mix")
class ChannelMix(Mixer):
    """σ(W_r x^r) ⊙ W_v relu(W_k x^k)², x^s = x + (x' − x) ⊙ μ^s with x' the token before (Peng 2023, RWKV)."""

    hidden: int

    def check(self) -> None:
        if self.hidden < 1:
            raise QkvError(f"hidden is at least 1, not {self.hidden}")

    def build(self, width: int) -> Body:
        return _ChannelMix(self, width)


class _ChannelMix(Shifting):
    def __init__(self, spec: ChannelMix, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.k_mix, self.r_mix = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.k = Linear(width, spec.hidden, axes=("hidden", "embed"))
        self.v = Linear(spec.hidden, width, axes=("embed", "hidden"))
        self.r = Linear(width, width, axes=("embed", "embed"))

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        return Recurrent(x=self.k_mix.new_zeros(batch, 1, len(self.k_mix)))

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        held = cell.now if isinstance(cell, Recurrent) else {}
        before = self.shift(x, context, self.past(context), held)
        if isinstance(cell, Recurrent):
            cell.now = {"x": before.last}
        k, r = (x + (before.all - x) * mix for mix in (self.k_mix, self.r_mix))
        return self.r(r).sigmoid() * self.v(F.relu(self.k(k)).square())
