"""Sparse mixtures of experts, in place of a feed-forward."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops import grouped
from qkv.parts.activation import activation
from qkv.parts.experts.routing import Router, TopK
from qkv.parts.feedforward import FeedForward, Gated
from qkv.parts.mixers.body import Body, Mixer
from qkv.spec import part
from qkv.state import Cell


class Sparse(Mixer):
    """Σ_e g_e f_e(x) over the few of `count` experts f_e to which the router sends x, with its gates g (Shazeer 2017).

    `shared` reads every token besides (DeepSeek). With a `capacity` c, an expert takes at most ⌈c k T / E⌉ of the T
    tokens of a training batch, first choices before second ones and earlier tokens first; what is over passes on its
    residual alone (Lepikhin 2020; Fedus 2021). Nothing is dropped outside of training, where a cache and the whole
    text must agree. Padding is sent to no expert.

    Emits `router` and `scores` (B T E), the router's logits and these as shares; `experts` (B T k), where a token is
    sent before any is dropped, E for padding; and `gates` (B T k).
    """

    hidden: int
    count: int
    router: Router
    act: str
    shared: Gated | FeedForward | None
    capacity: float | None

    def check(self) -> None:
        activation(self.act)
        if self.hidden < 1 or self.count < 1:
            raise QkvError("hidden and count are each at least 1")
        if self.capacity is not None and self.capacity <= 0:
            raise QkvError("the capacity is above 0; leave it out to drop no token")


@part("experts")
class Experts(Sparse):
    """Σ_e g_e W2_e (act(Wg_e x) ⊙ W1_e x): experts that are each a gated feed-forward (Mixtral, Jiang 2024).

    What is chosen, shared, dropped and emitted is said at `Sparse`.
    """

    hidden: int
    count: int
    router: Router = TopK()
    act: str = "silu"
    shared: Gated | FeedForward | None = None
    capacity: float | None = None

    def build(self, width: int) -> Body:
        return _Experts(self, width)


@part("plain-experts")
class PlainExperts(Sparse):
    """Σ_e g_e (W2_e act(W1_e x + b1_e) + b2_e): experts that are each a feed-forward (Shazeer 2017; Switch).

    What is chosen, shared, dropped and emitted is said at `Sparse`.
    """

    hidden: int
    count: int
    router: Router = TopK()
    act: str = "relu"
    bias: bool = True
    shared: Gated | FeedForward | None = None
    capacity: float | None = None

    def build(self, width: int) -> Body:
        return _PlainExperts(self, width)


class _Sparse(Body):
    """Sends tokens to experts and adds up what they make of them."""

    axes: ClassVar[dict[str, tuple[str, ...]]]
    """What the dimensions of the stacked weights mean, as `Linear.axes` says it of one matrix."""

    def __init__(self, spec: Sparse, width: int) -> None:
        super().__init__()
        self.spec, self.act = spec, activation(spec.act)
        self.router = spec.router.build(width, spec.count)
        sizes = {"expert": spec.count, "hidden": spec.hidden, "embed": width}
        bound = (6 / (spec.hidden + width)) ** 0.5  # Glorot's, for each expert by itself, as in `Linear`
        for name, axes in self.axes.items():
            weight = nn.Parameter(torch.empty([sizes[axis] for axis in axes]))
            nn.init.uniform_(weight, -bound, bound)
            self.register_parameter(name, weight)
        self.shared = None if spec.shared is None else spec.shared.build(width)

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        routed, valid = self.router(x, context), context.valid()
        experts = routed.experts if valid is None else routed.experts.masked_fill(~valid[..., None], self.spec.count)
        context.emit("router", routed.logits)
        context.emit("scores", routed.scores)
        context.emit("experts", experts)
        context.emit("gates", routed.gates)
        order, loads = self.sent(experts)
        tokens = order % (len(x) * x.shape[1])
        y = self.made(x.flatten(0, 1)[tokens], loads) * by_choice(routed.gates)[order, None]
        y = y.new_zeros(x.shape).flatten(0, 1).index_add(0, tokens, y).view(x.shape).to(x.dtype)
        return y if self.shared is None else y + self.shared(x, context)

    def sent(self, experts: Tensor) -> tuple[Tensor, list[int]]:
        """Choices, numbered as `by_choice` lays them, sorted by expert, and how many each expert reads."""
        order = by_choice(experts).argsort(stable=True)  # padding comes last
        loads = self.loads(experts)
        order = order[: sum(loads)]
        if self.training and self.spec.capacity is not None:
            most = math.ceil(self.spec.capacity * sum(loads) / self.spec.count)
            order = torch.cat([places[:most] for places in order.split(loads)])
            loads = [min(load, most) for load in loads]
        return order, loads

    def loads(self, experts: Tensor) -> list[int]:
        """How many tokens each expert gets; about equally many where the tensors have no values (the meta device)."""
        count, places = self.spec.count, experts.numel()
        if experts.is_meta:
            return [(e + 1) * places // count - e * places // count for e in range(count)]
        return experts.flatten().bincount(minlength=count + 1).tolist()[:-1]

    def made(self, x: Tensor, loads: list[int]) -> Tensor:
        """Rows sorted by expert, of which expert e takes the next loads[e] → what each makes of its own."""
        raise AssertionError(f"{type(self).__name__} does not say what an expert computes")


def by_choice(x: Tensor) -> Tensor:
    """B T k → all first choices, then all second ones, …: k·B·T."""
    return x.flatten(0, 1).t().flatten()


class _Experts(_Sparse):
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "gate": ("expert", "hidden", "embed"),
        "up": ("expert", "hidden", "embed"),
        "down": ("expert", "embed", "hidden"),
    }
    gate: nn.Parameter
    up: nn.Parameter
    down: nn.Parameter

    def made(self, x: Tensor, loads: list[int]) -> Tensor:
        gate, up = grouped.fused(x, self.gate, loads), grouped.fused(x, self.up, loads)
        return grouped.fused(self.act(gate) * up, self.down, loads)


class _PlainExperts(_Sparse):
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "up": ("expert", "hidden", "embed"),
        "down": ("expert", "embed", "hidden"),
    }
    undecayed = "up_bias", "down_bias"
    up: nn.Parameter
    down: nn.Parameter

    def __init__(self, spec: PlainExperts, width: int) -> None:
        super().__init__(spec, width)
        self.up_bias = nn.Parameter(torch.zeros(spec.count, spec.hidden)) if spec.bias else None
        self.down_bias = nn.Parameter(torch.zeros(spec.count, width)) if spec.bias else None

    def made(self, x: Tensor, loads: list[int]) -> Tensor:
        hidden = self.act(biased(grouped.fused(x, self.up, loads), self.up_bias, loads))
        return biased(grouped.fused(hidden, self.down, loads), self.down_bias, loads)


def biased(y: Tensor, bias: Tensor | None, loads: list[int]) -> Tensor:
    """y N O, sorted by expert, plus the bias (E O) of each row's expert."""
    if bias is None:
        return y
    return y + bias.repeat_interleave(torch.tensor(loads, device=y.device), 0, output_size=len(y))
