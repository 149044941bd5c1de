"""A sparse mixture of experts, in place of a feed-forward."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts.activation import activation
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.spec import Spec, part
from qkv.state import Cell


@dataclass(frozen=True, eq=False)
class Routed:
    """Where each token goes: `experts` and their `weights` (B T k), chosen by the scores `logits` (B T E)."""

    experts: Tensor
    weights: Tensor
    logits: Tensor


class Router(Spec):
    """Builds a module `(x: B T C) → Routed`."""

    def build(self, width: int, count: int) -> nn.Module:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


@part("top-k")
class TopK(Router):
    """p = softmax(W_r x) in fp32; the k experts of largest p, whose p are made to sum to 1 (Mixtral, Jiang 2024).

    That is the softmax over the chosen alone; without `normalise` their p stay as they are (Switch, Fedus 2021).
    """

    k: int = 2
    normalise: bool = True

    def build(self, width: int, count: int) -> nn.Module:
        if not 1 <= self.k <= count:
            raise QkvError(f"a token cannot go to {self.k} of {count} experts; give k between 1 and {count}")
        return _TopK(self, width, count)


class _TopK(nn.Module):
    def __init__(self, spec: TopK, width: int, count: int) -> None:
        super().__init__()
        self.spec, self.score = spec, Linear(width, count, axes=("expert", "embed"))

    def forward(self, x: Tensor) -> Routed:
        logits = self.score(x)
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = p.topk(self.spec.k, -1)
        if self.spec.normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routed(experts, weights, logits)


@part("experts")
class Experts(Mixer):
    """Σ_e p_e W2_e (act(Wg_e x) ⊙ W1_e x) over the few of `count` experts to which the router sends x (Shazeer 2017).

    Emits `router`, its scores (B T E), for a loss that balances the load. Padding is sent to no expert.
    """

    hidden: int
    count: int
    router: Router = TopK()
    act: str = "silu"

    def check(self) -> None:
        activation(self.act)
        if self.hidden < 1 or self.count < 1:
            raise QkvError("hidden and count are each at least 1")

    def build(self, width: int) -> Body:
        return _Experts(self, width)


class _Experts(Body):
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "gate": ("expert", "hidden", "embed"),
        "up": ("expert", "hidden", "embed"),
        "down": ("expert", "embed", "hidden"),
    }
    """What the dimensions of the stacked weights mean, as `Linear.axes` says it of one matrix."""

    def __init__(self, spec: Experts, width: int) -> None:
        super().__init__()
        self.spec, self.act = spec, activation(spec.act)
        self.router = spec.router.build(width, spec.count)
        self.gate = nn.Parameter(torch.empty(spec.count, spec.hidden, width))
        self.up = nn.Parameter(torch.empty(spec.count, spec.hidden, width))
        self.down = nn.Parameter(torch.empty(spec.count, width, spec.hidden))
        bound = (6 / (spec.hidden + width)) ** 0.5  # Glorot's, for each expert by itself, as in `Linear`
        for weight in (self.gate, self.up, self.down):
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        routed, valid = self.router(x), context.valid()
        context.emit("router", routed.logits)
        experts = routed.experts if valid is None else routed.experts.masked_fill(~valid[..., None], self.spec.count)
        order = experts.flatten().argsort(stable=True)  # by expert, padding last
        loads = self.loads(experts)
        order = order[: sum(loads)]
        tokens = order // experts.shape[-1]
        y = self.products(x.flatten(0, 1)[tokens], loads) * routed.weights.flatten()[order, None]
        return y.new_zeros(x.shape).flatten(0, 1).index_add(0, tokens, y).view(x.shape).to(x.dtype)

    def loads(self, experts: Tensor) -> list[int]:
        """How many tokens each expert gets; about equally many where the tensors have no values (the meta device)."""
        count, places = self.spec.count, experts.numel()
        if experts.is_meta:
            return [(e + 1) * places // count - e * places // count for e in range(count)]
        return experts.flatten().bincount(minlength=count + 1).tolist()[:-1]

    def products(self, x: Tensor, loads: list[int]) -> Tensor:
        """Rows sorted by expert, of which expert e takes the next loads[e] → what each makes of its own."""
        # unbind: the gradient of an index would have the size of all experts, once for each of them
        weights = zip(x.split(loads), self.gate.unbind(), self.up.unbind(), self.down.unbind(), strict=True)
        made = [F.linear(self.act(F.linear(s, g)) * F.linear(s, u), d) for s, g, u, d in weights if len(s)]
        return torch.cat(made) if made else x
