"""The slot `feature` of a memory: what queries and keys go through before they meet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.ops.precision import wide
from qkv.parts.activation import activation
from qkv.spec import Spec, part


class Feature(Spec):
    """A map of queries and keys, … K → … K, without parameters."""

    def build(self) -> nn.Module:
        return _Feature(self)

    def map(self, x: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} does not say what it does")


class _Feature(nn.Module):
    def __init__(self, spec: Feature) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        return self.spec.map(x)


@part("positive")
class Positive(Feature):
    """elu(x) + 1 > 0, so that weights are positive and their sum may divide (Katharopoulos 2020)."""

    def map(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


@part("pointwise")
class Pointwise(Feature):
    """act(x): relu (cosFormer's), silu (HGRN2's)."""

    act: str = "silu"

    def check(self) -> None:
        activation(self.act)

    def map(self, x: Tensor) -> Tensor:
        return activation(self.act)(x)


@part("softmax")
class Softmax(Feature):
    """softmax(x) over the channels of a head: positive, of sum 1.

    Efficient attention has queries so (Shen 2018); its keys are shares over positions, of which later ones are unknown
    here.
    """

    def map(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


@part("unit")
class Unit(Feature):
    """act(x) / √(Σ act(x)² + ε): keys of length 1, without which the delta rule erases too much (Yang 2024)."""

    act: str = "silu"
    eps: float = 1e-6

    def check(self) -> None:
        activation(self.act)

    def map(self, x: Tensor) -> Tensor:
        x = activation(self.act)(x)
        square = x.to(wide(x)).square().sum(-1, keepdim=True)
        return x * torch.rsqrt(square + self.eps).to(x.dtype)
