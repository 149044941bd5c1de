"""Mamba: a selective state space (Gu & Dao 2023)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops import scan
from qkv.parts.convolution import ShortConvolution
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.spec import part
from qkv.state import Cell, Recurrent


@part("mamba")
class Mamba(Mixer):
    """W_o (y ⊙ silu(W_z u)), where y is read from a state of N numbers for each of `inner` channels.

    x = silu(conv(W_x u)), B = W_B x, C = W_C x, Δ = softplus(W_up W_down x + b), A = −e^{A_log};
    h_t = e^{Δ_t A} ⊙ h_{t−1} + (Δ_t x_t) B_tᵀ, y_t = h_t C_t + D ⊙ x_t. Left out, `inner` is 2 C and `rank`, the width
    between W_down and W_up, ⌈C / 16⌉, as in the paper.
    """

    inner: int | None = None
    state: int = 16
    rank: int | None = None
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False

    def check(self) -> None:
        if any(n is not None and n < 1 for n in (self.inner, self.state, self.rank, self.conv)):
            raise QkvError("inner, state, rank and conv are each at least 1")

    def build(self, width: int) -> Body:
        return _Mamba(self, width)


class _Mamba(Body):
    def __init__(self, spec: Mamba, width: int) -> None:
        super().__init__()
        self.spec = spec
        inner, rank, N = spec.inner or 2 * width, spec.rank or math.ceil(width / 16), spec.state
        self.x = Linear(width, inner, bias=spec.bias, axes=("hidden", "embed"))
        self.z = Linear(width, inner, bias=spec.bias, axes=("hidden", "embed"))
        self.x_conv = ShortConvolution(inner, spec.conv, bias=spec.conv_bias)
        self.dt_down = Linear(inner, rank, axes=("rank", "hidden"))
        self.dt_up = Linear(rank, inner, axes=("hidden", "rank"))
        self.dt_bias = step_bias(inner)
        self.B = Linear(inner, N, axes=("state", "hidden"))
        self.C = Linear(inner, N, axes=("state", "hidden"))
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out = Linear(inner, width, bias=spec.bias, axes=("embed", "hidden"))
        nn.init.uniform_(self.dt_up.weight, -(rank**-0.5), rank**-0.5)

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        h = self.A_log.new_zeros(batch, *self.A_log.shape, dtype=wide(self.A_log))
        return Recurrent(taps=self.x_conv.no_taps(batch), h=h)

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        held = cell.now if isinstance(cell, Recurrent) else {}
        z, convolved = self.z(x), self.x_conv(self.x(x), held.get("taps"), context.lengths)
        x = F.silu(convolved.out)
        dt = step_size(self.dt_up(self.dt_down(x)), self.dt_bias, context)
        scanned = scan.chunked(x, dt, -self.A_log.to(dt.dtype).exp(), self.B(x), self.C(x), held.get("h"))
        if isinstance(cell, Recurrent):
            cell.now = {"taps": convolved.taps, "h": scanned.state}
        return self.out((scanned.out + self.D.to(x.dtype) * x) * F.silu(z))


# --- what both generations share ---


def wide(x: Tensor) -> torch.dtype:
    """Decays and states are kept in fp32 at least: a step size in bf16 is off by a hundredth of itself."""
    return torch.promote_types(x.dtype, torch.float32)


def step_bias(size: int, least: float = 1e-3, most: float = 0.1) -> nn.Parameter:
    """Biases whose softplus is log-uniform between `least` and `most`: channels that remember 10 to 1,000 tokens."""
    dt = torch.empty(size).uniform_(math.log(least), math.log(most)).exp()
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def step_size(x: Tensor, bias: Tensor, context: Context, limit: tuple[float, float] | None = None) -> Tensor:
    """Δ = softplus(x + b) within the limit, B T D; 0 for padding, which then neither decays nor writes anything."""
    dt, valid = F.softplus(x.to(wide(x)) + bias), context.valid()
    if limit is not None:
        dt = dt.clamp(*limit)
    return dt if valid is None else dt.masked_fill(~valid[..., None], 0.0)
