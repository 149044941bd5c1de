"""Mamba-2: a state space with one decay a head, which is a memory of matrix products (Dao & Gu 2024)."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops import recall
from qkv.ops.precision import wide
from qkv.parts.convolution import ShortConvolution
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.mamba import check_rates, drawn_rates, step_bias, step_size
from qkv.parts.mixers.recurrence import Recurrence
from qkv.spec import part
from qkv.state import Cell, Recurrent


@part("mamba2")
class Mamba2(Mixer):
    """W_o norm(y ⊙ silu(W_z u)), where y is read from a memory of `state` × `head_width` numbers for each head.

    x = silu(conv(W_x u)), B = silu(conv(W_B u)), C = silu(conv(W_C u)), Δ = softplus(W_Δ u + b), A = −e^{A_log};
    S_t = e^{Δ_t A} S_{t−1} + B_t (Δ_t x_t)ᵀ, y_t = S_tᵀ C_t + D x_t. Heads share B and C in `groups`, and the RMS norm
    runs over the channels of each group. Left out, `head_width` makes all heads together 2 C wide. `step_limit` bounds
    Δ; at first e^{A_log} lies in `rates`. Where the model's mask lets a token not see the one before it, S is 0.
    """

    heads: int
    head_width: int | None = None
    groups: int = 1
    state: int = 128
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    step_limit: tuple[float, float] | None = None
    eps: float = 1e-5
    rates: tuple[float, float] = (1.0, 16.0)

    def check(self) -> None:
        if any(n is not None and n < 1 for n in (self.heads, self.head_width, self.groups, self.state, self.conv)):
            raise QkvError("heads, head_width, groups, state and conv are each at least 1")
        if self.heads % self.groups:
            raise QkvError(f"{self.groups} groups do not divide {self.heads} heads")
        check_rates(self.rates)
        if self.step_limit is not None and not 0 <= self.step_limit[0] <= self.step_limit[1]:
            raise QkvError(f"step_limit is the least and the most step, from 0 up, not {self.step_limit}")

    def build(self, width: int) -> Body:
        if self.head_width is None and 2 * width % self.heads:
            raise QkvError(f"{self.heads} heads do not divide 2 × the width {width}; change heads or give a head_width")
        return _Mamba2(self, width)


class _Mamba2(Recurrence):
    def __init__(self, spec: Mamba2, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.head_width = spec.head_width or 2 * width // spec.heads
        inner, shared = spec.heads * self.head_width, spec.groups * spec.state
        self.z = Linear(width, inner, bias=spec.bias, axes=("heads", "embed"))
        self.x = Linear(width, inner, bias=spec.bias, axes=("heads", "embed"))
        self.B = Linear(width, shared, bias=spec.bias, axes=("heads", "embed"))
        self.C = Linear(width, shared, bias=spec.bias, axes=("heads", "embed"))
        self.dt = Linear(width, spec.heads, bias=spec.bias, axes=("heads", "embed"))
        self.x_conv = ShortConvolution(inner, spec.conv, bias=spec.conv_bias)
        self.B_conv = ShortConvolution(shared, spec.conv, bias=spec.conv_bias)
        self.C_conv = ShortConvolution(shared, spec.conv, bias=spec.conv_bias)
        self.dt_bias = step_bias(spec.heads)
        self.A_log = drawn_rates(spec.heads, spec.rates)
        self.D = nn.Parameter(torch.ones(spec.heads))
        self.norm = _GatedNorm(spec, inner)
        self.out = Linear(inner, width, bias=spec.bias, axes=("embed", "heads"))

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        shape = batch, self.spec.heads, self.spec.state, self.head_width
        taps = {name: conv.no_taps(batch) for name, conv in zip("xBC", self.convolutions, strict=True)}
        return Recurrent(S=self.A_log.new_zeros(shape, dtype=wide(self.A_log)), **taps)

    @property
    def convolutions(self) -> tuple[ShortConvolution, ShortConvolution, ShortConvolution]:
        return self.x_conv, self.B_conv, self.C_conv

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        spec, past, held = self.spec, self.past(context), cell.now if isinstance(cell, Recurrent) else {}
        z, dt = self.z(x), step_size(self.dt(x), self.dt_bias, context, spec.step_limit)
        u = self.x_conv(self.x(x), held.get("x"), context.lengths, past.ages)
        B = self.B_conv(self.B(x), held.get("B"), context.lengths, past.ages)
        C = self.C_conv(self.C(x), held.get("C"), context.lengths, past.ages)
        v = F.silu(u.out).unflatten(-1, (spec.heads, -1))
        k, q = (F.silu(y.out).unflatten(-1, (spec.groups, -1)).transpose(1, 2) for y in (B, C))
        g, first = dt * -self.A_log.to(dt.dtype).exp(), past.first()
        if first is not None:
            g = g.masked_fill(first[..., None], -torch.inf)
        read = recall.chunked(q, k, (v * dt[..., None]).transpose(1, 2), g.mT, state=held.get("S"))
        if isinstance(cell, Recurrent):
            cell.now = {"x": u.taps, "B": B.taps, "C": C.taps, "S": read.state}
        y = read.out.transpose(1, 2) + self.D[:, None] * v
        return self.out(self.norm(y.flatten(2).to(x.dtype), z))


class _GatedNorm(nn.Module):
    """γ ⊙ y / √(mean y² + ε), y ← y ⊙ silu(z): gated first, the mean over the channels of each group."""

    def __init__(self, spec: Mamba2, inner: int) -> None:
        super().__init__()
        self.spec, self.weight = spec, nn.Parameter(torch.ones(inner))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        y = (y * F.silu(z)).unflatten(-1, (self.spec.groups, -1))
        return F.rms_norm(y, y.shape[-1:], eps=self.spec.eps).flatten(-2) * self.weight
