"""What experts add to a loss, so that each of them gets work: means over the tokens and layers of a batch."""

import dataclasses as dc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.errors import QkvError
from qkv.ops.precision import wide
from qkv.spec import Spec, part

ALWAYS = ("experts", "scores")


@dc.dataclass(frozen=True, eq=False)
class Layer:
    """What the experts of one layer emitted (`parts.Sparse`)."""

    values: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """In fp32 at least."""
        return self.values[name].to(wide(self.values[name]))

    @property
    def experts(self) -> Tensor:
        """B T k: where each token is sent; E for padding."""
        return self.values["experts"]

    @property
    def count(self) -> int:
        """E."""
        return self.values["scores"].shape[-1]

    @property
    def real(self) -> Tensor:
        """B T: which tokens are no padding."""
        return self.experts[..., 0] < self.count

    @property
    def tokens(self) -> Tensor:
        """B: how many those are."""
        return self.real.sum(1)

    def sent(self, weights: Tensor | None = None) -> Tensor:
        """B E: how often a row's tokens are sent to each expert, or the sum of these weights (B T k)."""
        weights = torch.ones_like(self.experts, dtype=self["scores"].dtype) if weights is None else weights
        sums = weights.new_zeros(len(weights), self.count + 1)
        return sums.scatter_add(1, self.experts.flatten(1), weights.flatten(1))[:, :-1]

    def scored(self) -> Tensor:
        """B E: the sums of each row's scores."""
        return self["scores"].masked_fill(~self.real[..., None], 0.0).sum(1)


class Auxiliary(Spec):
    """A term of an objective: weight × value is added to the loss of each token that the objective predicts."""

    weight: float
    reads: ClassVar[str] = "scores"
    """What it needs of each layer."""

    def check(self) -> None:
        if self.weight < 0:
            raise QkvError("the weight of an auxiliary loss is not negative")

    def value(self, layers: Sequence[Layer]) -> Tensor:
        """A number, of all layers with experts."""
        raise AssertionError(f"{type(self).__name__} does not say what its value is")


def listen(terms: Sequence[Auxiliary]) -> Tap:
    """A tap for what these terms read."""
    return Tap(*(f"**.{name}" for name in {*ALWAYS, *(term.reads for term in terms)}))


def weighted(terms: Sequence[Auxiliary], tap: Tap) -> Tensor:
    """Σ weight × value; `QkvError` where the model has not what a term reads."""
    paths = [path.removesuffix("experts") for path in tap.find("**.experts")]
    for term in terms:
        lacking = [path for path in paths if path + term.reads not in tap.values]
        if lacking or not paths:
            why = f"the router at {lacking[0].removesuffix('.')} emits none" if lacking else "the model has no experts"
            raise QkvError(f"the auxiliary loss {term.kind!r} reads {term.reads!r}, and {why}: leave it out")
    names = {*ALWAYS, *(term.reads for term in terms)}
    layers = [Layer({name: tap[path + name] for name in names}) for path in paths]
    return torch.stack([term.weight * term.value(layers) for term in terms]).sum()


@part("balance")
class Balance(Auxiliary):
    """E Σ_e f_e P_e, f and P pooled over layers before they are multiplied: k for even loads (Fedus 2021; Mixtral).

    f_e is how often, of k times, a token of the batch is sent to expert e, on average; P_e its average score. Batches
    whose gradients are accumulated are each balanced by themselves: `SequenceBalance` does not depend on that.
    """

    weight: float = 0.01

    def value(self, layers: Sequence[Layer]) -> Tensor:
        if len({layer.count for layer in layers}) > 1:
            raise QkvError("balance pools layers that have equally many experts; take sequence-balance here")
        tokens = torch.cat([layer.tokens for layer in layers]).sum().clamp_min(1)
        f = torch.cat([layer.sent() for layer in layers]).sum(0) / tokens
        P = torch.cat([layer.scored() for layer in layers]).sum(0) / tokens
        return layers[0].count * (f * P).sum()


@part("sequence-balance")
class SequenceBalance(Auxiliary):
    """Mean over tokens and layers of E Σ_e f_e P_e, f and P those of the token's own row: k where loads are even.

    So accumulated batches teach what one large batch does, where every token that experts read is predicted (those of
    an encoder that reads a source are weighed by its targets). DeepSeek-V2, equations 23 to 25, with α = k times this
    weight.
    """

    weight: float = 0.001

    def value(self, layers: Sequence[Layer]) -> Tensor:
        return torch.stack([self.of(layer) for layer in layers]).mean()

    def of(self, layer: Layer) -> Tensor:
        rows = layer.count * (layer.sent() * layer.scored()).sum(-1) / layer.tokens.clamp_min(1)
        return rows.sum() / layer.tokens.sum().clamp_min(1)


@part("importance")
class Importance(Auxiliary):
    """CV(Σ_x G(x))², the sum over the tokens of a batch of their gates; mean over layers (Shazeer 2017, equation 7)."""

    weight: float = 0.1
    reads: ClassVar[str] = "gates"

    def value(self, layers: Sequence[Layer]) -> Tensor:
        return torch.stack([variation(layer.sent(layer["gates"]).sum(0)) for layer in layers]).mean()


@part("load")
class Load(Auxiliary):
    """CV(Σ_x P(x))², P as `NoisyTopK` emits it, over the tokens of a batch; mean over layers (Shazeer 2017, eq. 11)."""

    weight: float = 0.1
    reads: ClassVar[str] = "load"

    def value(self, layers: Sequence[Layer]) -> Tensor:
        return torch.stack([variation(layer["load"][layer.real].sum(0)) for layer in layers]).mean()


@part("router-z")
class RouterZ(Auxiliary):
    """Mean over tokens and layers of (log Σ_e exp z_e)², z a router's logits: keeps them small (ST-MoE, Zoph 2022).

    Accumulated batches teach what one large batch does where every token that experts read is predicted.
    """

    weight: float = 0.001
    reads: ClassVar[str] = "router"

    def value(self, layers: Sequence[Layer]) -> Tensor:
        z = [layer["router"][layer.real].logsumexp(-1).square() for layer in layers]
        return torch.stack([one.sum() / max(len(one), 1) for one in z]).mean()


def variation(x: Tensor) -> Tensor:
    """CV(x)², the variance over the square of the mean."""
    return x.var(correction=0) / x.mean().square().clamp_min(1e-20)  # of no tokens, 0
