"""Mamba: a selective state space (Gu & Dao 2023)."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops import scan
from qkv.ops.precision import wide
from qkv.parts.convolution import ShortConvolution
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.recurrence import Recurrence
from qkv.parts.norm import Norm
from qkv.spec import part
from qkv.state import Cell, Recurrent


@part("mamba")
class Mamba(Mixer):
    """W_o (y ⊙ silu(W_z u)), where y is read from a state of N numbers for each of `inner` channels.

    x = silu(conv(W_x u)), B = W_B x, C = W_C x, Δ = softplus(W_up W_down x + b), A = −e^{A_log};
    h_t = e^{Δ_t A} ⊙ h_{t−1} + (Δ_t x_t) B_tᵀ, y_t = h_t C_t + D ⊙ x_t. Left out, `inner` is 2 C and `rank`, the width
    between W_down and W_up, ⌈C / 16⌉, as in the paper. The `norm` is of W_down x, B and C, each with its own weights
    (Lieber 2024, Jamba). Where the model's mask lets a token not see the one before it, h is 0.
    """

    inner: int | None = None
    state: int = 16
    rank: int | None = None
    conv: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm: Norm | None = None

    def check(self) -> None:
        if any(n is not None and n < 1 for n in (self.inner, self.state, self.rank, self.conv)):
            raise QkvError("inner, state, rank and conv are each at least 1")
        if self.norm is not None and self.norm.over_batch:
            raise QkvError("steps cannot be normalised over the batch, whose padding they do not know")

    def build(self, width: int) -> Body:
        return _Mamba(self, width)


class _Mamba(Recurrence):
    undecayed = ("A_log",)

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
        self.dt_norm, self.B_norm, self.C_norm = (spec.norm.build(n) if spec.norm else None for n in (rank, N, N))
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out = Linear(inner, width, bias=spec.bias, axes=("embed", "hidden"))
        nn.init.uniform_(self.dt_up.weight, -(rank**-0.5), rank**-0.5)

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        h = self.A_log.new_zeros(batch, *self.A_log.shape, dtype=wide(self.A_log))
        return Recurrent(taps=self.x_conv.no_taps(batch), h=h)

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        past, held = self.past(context), cell.now if isinstance(cell, Recurrent) else {}
        z, convolved = self.z(x), self.x_conv(self.x(x), held.get("taps"), context.lengths, past.ages)
        x = F.silu(convolved.out)
        low, B, C = (
            normed(self.dt_norm, self.dt_down(x)),
            normed(self.B_norm, self.B(x)),
            normed(self.C_norm, self.C(x)),
        )
        dt = step_size(self.dt_up(low), self.dt_bias, context)
        A = -self.A_log.to(dt.dtype).exp()
        scanned = scan.chunked(x, dt, A, B, C, held.get("h"), past.first())
        if isinstance(cell, Recurrent):
            cell.now = {"taps": convolved.taps, "h": scanned.state}
        return self.out((scanned.out + self.D.to(x.dtype) * x) * F.silu(z))


def normed(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


# --- what both generations share ---


def step_bias(size: int, least: float = 1e-3, most: float = 0.1) -> nn.Parameter:
    """Biases whose softplus is log-uniform between `least` and `most`: channels that remember 10 to 1,000 tokens."""
    dt = torch.empty(size).uniform_(math.log(least), math.log(most)).exp()
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def check_rates(rates: tuple[float, float]) -> None:
    if not 0 < rates[0] <= rates[1] < math.inf:
        raise QkvError(f"rates are the least and the most rate at first, above 0, not {rates}")


def drawn_rates(heads: int, rates: tuple[float, float]) -> nn.Parameter:
    """A_log of heads whose rates e^{A_log} are drawn uniformly between two."""
    return nn.Parameter(torch.empty(heads).uniform_(*rates).log())


def step_size(x: Tensor, bias: Tensor, context: Context, limit: tuple[float, float] | None = None) -> Tensor:
    """Δ = softplus(x + b) within the limit, B T D; 0 for padding, which then neither decays nor writes anything."""
    dt, valid = F.softplus(x.to(wide(x)) + bias), context.valid()
    if limit is not None:
        dt = dt.clamp(*limit)
    return dt if valid is None else dt.masked_fill(~valid[..., None], 0.0)
