"""Which experts read a token, and with what weights their outputs are added."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops.precision import as_given, wide
from qkv.parts.linear import Linear
from qkv.spec import Spec, nearest, part


@dataclass(frozen=True, eq=False)
class Routed:
    """Where each token goes."""

    experts: Tensor
    """B T k, the first choice first."""
    gates: Tensor
    """B T k: the weight of each chosen expert's output."""
    logits: Tensor
    """B T E."""
    scores: Tensor
    """B T E: the logits as shares that sum to 1."""


class Router(Spec):
    """Builds a module `(x: B T C, context) → Routed`.

    If that has a method `after_step`, training calls it once after each step of the optimiser.
    """

    k: int

    def build(self, width: int, count: int) -> nn.Module:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")

    def refuse(self, count: int) -> None:
        """Raise where there are not k experts to choose."""
        if not 1 <= self.k <= count:
            raise QkvError(f"a token cannot go to {self.k} of {count} experts; give k between 1 and {count}")


def product(linear: Linear, x: Tensor) -> Tensor:
    """W x in fp32 (or as wide as W is) under autocast too: in bf16 one token in a hundred would go elsewhere."""
    with as_given(x):
        y: Tensor = linear(x.to(linear.weight.dtype))
        return y.to(wide(y))


@part("top-k")
class TopK(Router):
    """p = softmax(W_r x) in fp32; the k experts of largest p, whose p are made to sum to 1 (Mixtral, Jiang 2024).

    That is the softmax over the chosen alone; without `normalise` their p stay as they are (Switch, Fedus 2021).
    """

    k: int = 2
    normalise: bool = True

    def build(self, width: int, count: int) -> nn.Module:
        self.refuse(count)
        return _TopK(self, width, count)


class _TopK(nn.Module):
    def __init__(self, spec: TopK, width: int, count: int) -> None:
        super().__init__()
        self.spec, self.score = spec, Linear(width, count, axes=("expert", "embed"))

    def forward(self, x: Tensor, context: Context) -> Routed:
        logits = product(self.score, x)
        p = logits.softmax(-1)
        gates, experts = p.topk(self.spec.k, -1)
        if self.spec.normalise:
            gates = gates / gates.sum(-1, keepdim=True)
        return Routed(experts, gates, logits, p)


@part("noisy-top-k")
class NoisyTopK(Router):
    """H(x) = W_g x + ε ⊙ softplus(W_n x), ε normal and drawn in training only; gates softmax(KeepTopK(H(x), k)).

    KeepTopK sets all but the k largest to −∞; both matrices begin at zero, so that noise alone spreads the first tokens
    (Shazeer 2017, equations 3 to 5). Emits `load` (B T E), P(x, i) of equation 9: the chance that expert i is among the
    chosen if its noise alone were drawn again, Φ((W_g x − the k-th largest of the other H) / softplus(W_n x))_i.
    """

    k: int = 2

    def build(self, width: int, count: int) -> nn.Module:
        self.refuse(count)
        return _NoisyTopK(self, width, count)


class _NoisyTopK(nn.Module):
    def __init__(self, spec: NoisyTopK, width: int, count: int) -> None:
        super().__init__()
        self.spec = spec
        self.score = Linear(width, count, axes=("expert", "embed"))
        self.noise = Linear(width, count, axes=("expert", "embed"))
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x: Tensor, context: Context) -> Routed:
        H = clean = product(self.score, x)
        if self.training or context.wants("load"):
            spread = F.softplus(product(self.noise, x))
            if self.training:  # from torch's own generator, as dropout: recomputation draws the same
                H = clean + torch.randn_like(clean) * spread
            if context.wants("load"):
                context.emit("load", chances(clean, H, spread, self.spec.k))
        kept, experts = H.topk(self.spec.k, -1)
        return Routed(experts, kept.softmax(-1), H, H.softmax(-1))


def chances(clean: Tensor, H: Tensor, spread: Tensor, k: int) -> Tensor:
    """P(x, i), all B T E."""
    if k == H.shape[-1]:
        return torch.ones_like(H)
    top = H.topk(k + 1, -1).values
    kth, after = top[..., k - 1 : k], top[..., k:]
    bar = torch.where(after < H, after, kth)  # the k-th largest of the others
    return torch.special.ndtr((clean - bar) / spread.clamp_min(1e-6))  # a smaller spread would give 0/0 and ∞ · 0


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": partial(torch.softmax, dim=-1)}


@part("biased-top-k")
class BiasedTopK(Router):
    """s = sigmoid(W_r x) in fp32; the k experts of largest s + b, whose s, made to sum to 1, times `scale` are gates.

    b only chooses. After each step b_e grows by `speed` where expert e got fewer tokens in it than the mean, and
    shrinks by as much where it got more, in place of a loss that balances (Wang 2024; DeepSeek-V3). Without
    `normalise`, and with score="softmax", gates are DeepSeek-V2's. A speed of 0 leaves b as it is.
    """

    k: int = 2
    score: str = "sigmoid"
    normalise: bool = True
    scale: float = 1.0
    speed: float = 0.001

    def check(self) -> None:
        if self.score not in SCORES:
            raise QkvError(f"unknown score {self.score!r}{nearest(self.score, SCORES)}")
        if self.speed < 0 or self.scale <= 0:
            raise QkvError("speed is not negative, and scale above 0")

    def build(self, width: int, count: int) -> nn.Module:
        self.refuse(count)
        return _BiasedTopK(self, width, count)


class _BiasedTopK(nn.Module):
    bias: Tensor

    def __init__(self, spec: BiasedTopK, width: int, count: int) -> None:
        super().__init__()
        self.spec, self.shares = spec, SCORES[spec.score]
        self.score = Linear(width, count, axes=("expert", "embed"))
        self.register_buffer("bias", torch.zeros(count))
        self.load: Tensor | None = None
        """Tokens that each expert got since the last step. It is empty whenever a checkpoint is written."""

    def forward(self, x: Tensor, context: Context) -> Routed:
        logits = product(self.score, x)
        s = self.shares(logits)
        experts = (s.detach() + self.bias).topk(self.spec.k, -1).indices
        gates = s.gather(-1, experts)
        if self.spec.normalise:
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
        if self.training and self.spec.speed:
            self.count(experts, context.valid())
        return Routed(experts, gates * self.spec.scale, logits, s / s.sum(-1, keepdim=True).clamp_min(1e-20))

    @torch.no_grad()
    def count(self, experts: Tensor, valid: Tensor | None) -> None:
        """Add to the loads. Gradient checkpointing counts a token twice, but all alike: the comparison stays."""
        real = torch.ones_like(experts) if valid is None else valid[..., None].expand_as(experts)
        before = torch.zeros_like(self.bias, dtype=torch.float32) if self.load is None else self.load
        self.load = before.index_add(0, experts.flatten(), real.flatten().to(before.dtype))

    @torch.no_grad()
    def after_step(self) -> None:
        if self.load is not None:
            self.bias += self.spec.speed * (self.load.mean() - self.load).sign()
            self.load = None
