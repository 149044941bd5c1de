"""The slot `decay` of a memory: how much of what it holds is left when the next token comes, g = log of that share."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.ops.precision import wide
from qkv.parts.linear import Linear
from qkv.parts.mixers.mamba import check_rates, drawn_rates, step_bias
from qkv.spec import Spec, part, positive


class Decay(Spec):
    """Builds a module x (B T C) → g ≤ 0: one number for each head (H), token (B H T) or key channel (B H T K)."""

    ties: ClassVar[bool] = False
    """Whether a token's key is 1 − e^g, what the memory lets go, so that it needs no other."""

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Project(nn.Module):
    """W x + b, or W_up W_down x + b through `rank` channels, in the type of gates; B T C → B T O."""

    def __init__(self, width: int, outputs: int, rank: int | None, bias: Tensor | None) -> None:
        super().__init__()
        self.down = Linear(width, rank, axes=("rank", "embed")) if rank else None
        self.up = Linear(rank or width, outputs, axes=("heads", "rank" if rank else "embed"))
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x if self.down is None else self.down(x))
        y = y.to(wide(y))  # exponents: rounded to bf16, a decay of .999 is another number
        return y if self.bias is None else y + self.bias


# --- constant ---


@part("per-head")
class PerHead(Decay):
    """e^g = 1 − 2^(−first − h), h = 0 … H−1: each head forgets half as fast as the one before (Sun 2023, RetNet)."""

    first: float = 5.0

    def check(self) -> None:
        if not self.first > 0:
            raise QkvError(f"first lies above 0, where the fastest head forgets all, not at {self.first}")

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        return _PerHead(self, heads)


class _PerHead(nn.Module):
    def __init__(self, spec: PerHead, heads: int) -> None:
        super().__init__()
        self.spec, self.heads = spec, heads

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(self.heads, dtype=wide(x), device=x.device) + self.spec.first
        return torch.log1p(-torch.exp2(-at))


# --- decided by the token: a sigmoid ---


@part("per-token")
class PerToken(Decay):
    """e^g = σ(W x + b)^(1 / temperature), one number a head (gated retention, Sun 2024; with 1, mLSTM's forget gate).

    `cap` c bounds what goes into the sigmoid to c tanh(· / c). `start` is b at first, from the first head to the last.
    """

    temperature: float = 16.0
    cap: float | None = None
    start: tuple[float, float] = (0.0, 0.0)

    def check(self) -> None:
        positive(self, "temperature", "cap")

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        return _PerToken(self, width, heads)


class _PerToken(nn.Module):
    def __init__(self, spec: PerToken, width: int, heads: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Project(width, heads, None, torch.linspace(*spec.start, heads))

    def forward(self, x: Tensor) -> Tensor:
        return F.logsigmoid(capped(self.gate(x), self.spec.cap)).mT / self.spec.temperature


@part("per-channel")
class PerChannel(Decay):
    """e^g = σ(W_up W_down x + b)^(1 / temperature), one number a key channel (Yang 2023, GLA).

    `start` is b at first.
    """

    rank: int = 16
    temperature: float = 16.0
    start: float = 0.0

    def check(self) -> None:
        positive(self, "rank", "temperature")

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        return _PerChannel(self, width, heads, key_width)


class _PerChannel(nn.Module):
    def __init__(self, spec: PerChannel, width: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.spec, self.heads = spec, heads
        self.gate = Project(width, heads * key_width, spec.rank, torch.full((heads * key_width,), spec.start))

    def forward(self, x: Tensor) -> Tensor:
        return by_head(F.logsigmoid(self.gate(x)) / self.spec.temperature, self.heads)


@part("tied")
class Tied(Decay):
    """e^g = floor + (1 − floor) σ(W x), and the key is 1 − e^g: what it forgets, it writes (Qin 2024, HGRN2).

    A higher `floor` remembers longer; in the paper it rises from layer to layer.
    """

    floor: float = 0.0

    ties: ClassVar[bool] = True

    def check(self) -> None:
        if not 0 <= self.floor < 1:
            raise QkvError(f"the floor of a decay lies in [0, 1), not at {self.floor}")

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        return _Tied(self, width, heads, key_width)


class _Tied(nn.Module):
    def __init__(self, spec: Tied, width: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.spec, self.heads = spec, heads
        self.gate = Project(width, heads * key_width, None, None)

    def forward(self, x: Tensor) -> Tensor:
        x, floor = self.gate(x), self.spec.floor
        # σ(x) = e^(−softplus(−x)): without a floor the log of a small share keeps all its digits
        return by_head(torch.log(floor + (1 - floor) * x.sigmoid()) if floor else F.logsigmoid(x), self.heads)


# --- decided by the token: a step through time ---


@part("step-size")
class StepSize(Decay):
    """g = −e^(A_log) softplus(W x + b): a step of the size that the token decides, at the rate of the head.

    One step a head (Gated DeltaNet, Yang 2024), or one a key channel through a `rank` (KDA, Kimi 2025). At first each
    head's rate is drawn from `rates`, uniformly, and steps are of 0.001 to 0.1: as published, memories of 1 to 1,000
    tokens, most of some 10. A training too short to change that needs lower rates to recall what lies far back.
    """

    rank: int | None = None
    rates: tuple[float, float] = (1.0, 16.0)

    def check(self) -> None:
        positive(self, "rank")
        check_rates(self.rates)

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        return _StepSize(self, width, heads, key_width)


class _StepSize(nn.Module):
    def __init__(self, spec: StepSize, width: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.spec, self.heads = spec, heads
        steps = heads * key_width if spec.rank else heads
        self.step = Project(width, steps, spec.rank, step_bias(steps).detach())
        self.A_log = drawn_rates(heads, spec.rates)

    def forward(self, x: Tensor) -> Tensor:
        steps = by_head(F.softplus(self.step(x)), self.heads)
        g = -self.A_log.to(steps.dtype).exp()[:, None, None] * steps
        return g if self.spec.rank else g[..., 0]


# --- what they share ---


def by_head(x: Tensor, heads: int) -> Tensor:
    """B T (H × K) → B H T K."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)
