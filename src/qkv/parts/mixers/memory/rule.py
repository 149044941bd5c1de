"""The slot `rule` of a memory: how a token's key and value are written into it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.ops import recall
from qkv.ops.precision import wide
from qkv.parts.mixers.memory.decay import Project, capped
from qkv.spec import Spec, part, positive


@dataclass(frozen=True, eq=False)
class Write:
    """What goes to the recurrence, and what is done to what it reads."""

    k: Tensor
    """B G T K, or B H T K."""
    g: Tensor | None
    """H, B H T or B H T K."""
    beta: Tensor | None = None
    """B H T: with the delta rule."""
    divide: Callable[[Tensor, Tensor], Tensor] | None = None
    """(what was read, … V; what was read of a column of ones, … 1) → … V. None needs no such column."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """What the rule itself carries on to the next token."""


class Rule(Spec):
    """Builds a `Writing`."""

    @property
    def column(self) -> bool:
        """Whether the memory holds a column of ones beside the values."""
        return False

    def build(self, width: int, heads: int) -> "Writing":
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Writing(nn.Module):
    def new(self, batch: int) -> dict[str, Tensor]:
        """What it holds before the first token."""
        return {}

    def forward(
        self, x: Tensor, k: Tensor, g: Tensor | None, valid: Tensor | None, held: Mapping[str, Tensor]
    ) -> Write:
        """x: B T C; k and g: as in `Write`, 0 where `valid` (B T) says that there is no token."""
        raise AssertionError(f"{type(self).__name__} does not say what it writes")


@part("add")
class Add(Rule):
    """S ← e^g S + k vᵀ: what is read is a sum of values.

    With `normalise` it is a mean, Σ_j w_j v_j / (Σ_j w_j + ε), where features keep the weights w positive.
    """

    normalise: bool = False
    eps: float = 1e-6

    @property
    def column(self) -> bool:
        return self.normalise

    def build(self, width: int, heads: int) -> Writing:
        return _Add(self)


class _Add(Writing):
    def __init__(self, spec: Add) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self, x: Tensor, k: Tensor, g: Tensor | None, valid: Tensor | None, held: Mapping[str, Tensor]
    ) -> Write:
        return Write(k, g, divide=self.mean if self.spec.normalise else None)

    def mean(self, out: Tensor, total: Tensor) -> Tensor:
        return out / (total + self.spec.eps)


@part("delta")
class Delta(Rule):
    """S ← (I − β k kᵀ) e^g S + β k vᵀ, β = most · σ(W x): what the key held is replaced by v as far as β says.

    Schlag 2021, Yang 2024 (DeltaNet). With `most` = 2 a key may turn its content over, which tracks states that flip
    (Grazzi 2024). Keys must have a length of 1: `feature=Unit()`.
    """

    most: float = 1.0

    def check(self) -> None:
        if not 0 < self.most <= 2:
            raise QkvError(f"most lies in (0, 2], beyond which the memory grows without bound, not at {self.most}")

    def build(self, width: int, heads: int) -> Writing:
        return _Delta(self, width, heads)


class _Delta(Writing):
    def __init__(self, spec: Delta, width: int, heads: int) -> None:
        super().__init__()
        self.spec, self.rate = spec, Project(width, heads, None, None)

    def forward(
        self, x: Tensor, k: Tensor, g: Tensor | None, valid: Tensor | None, held: Mapping[str, Tensor]
    ) -> Write:
        beta = self.rate(x).sigmoid().mT * self.spec.most
        return Write(k, g, beta if valid is None else beta.masked_fill(~valid[:, None], 0))


@part("exponential")
class Exponential(Rule):
    """S ← e^g S + e^i k vᵀ, n ← e^g n + e^i k, i = W x + b, read as Sᵀq / max(|n·q|, 1) (Beck 2024, mLSTM).

    `cap` c bounds i to c tanh(· / c); `start` is b at first. Both are held divided by e^m, the largest weight in them,
    so that no exponential overflows: m_t = max(g_t + m_{t−1}, i_t).
    """

    cap: float | None = None
    start: float = 0.0
    eps: float = 1e-6

    def check(self) -> None:
        positive(self, "cap")

    @property
    def column(self) -> bool:
        return True

    def build(self, width: int, heads: int) -> Writing:
        return _Exponential(self, width, heads)


class _Exponential(Writing):
    def __init__(self, spec: Exponential, width: int, heads: int) -> None:
        super().__init__()
        self.spec, self.heads = spec, heads
        self.gate = Project(width, heads, None, torch.full((heads,), spec.start))

    def new(self, batch: int) -> dict[str, Tensor]:
        weight = self.gate.up.weight
        return {"m": weight.new_zeros(batch, self.heads, dtype=wide(weight))}

    def forward(
        self, x: Tensor, k: Tensor, g: Tensor | None, valid: Tensor | None, held: Mapping[str, Tensor]
    ) -> Write:
        i = capped(self.gate(x), self.spec.cap).mT
        if valid is not None:
            i = i.masked_fill(~valid[:, None], -torch.inf)
        g = torch.zeros_like(i) if g is None else g[:, None] if g.dim() == 1 else g
        # any m does as long as no exponent becomes positive: the slowest channel of a vector decides
        f = (g.amax(-1) if g.dim() == 4 else g).expand_as(i)
        before = held["m"] if held else torch.zeros_like(i[..., 0])
        m = recall.running_max(f, i, before)
        shrink = torch.cat((before[..., None], m[..., :-1]), -1) - m
        k = repeat(k, self.heads) * (i - m).exp()[..., None]
        g = g + (shrink[..., None] if g.dim() == 4 else shrink)

        def divide(out: Tensor, total: Tensor) -> Tensor:
            return out / (torch.maximum(total.abs(), (-m).exp()[..., None]) + self.spec.eps)

        return Write(k, g, divide=divide, held={"m": m[..., -1]})


def repeat(x: Tensor, heads: int) -> Tensor:
    """B G T K → B H T K: the keys of each head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
