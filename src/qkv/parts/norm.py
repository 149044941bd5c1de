"""Norms: a slot of a branch, of an embedding, of queries and keys. Every norm is called `norm(x, context)`."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops.precision import wide
from qkv.spec import Spec, part


class Norm(Spec):
    """Builds a module `(x: … C, context | None) → … C`; only a norm over the batch needs the context."""

    over_batch: ClassVar[bool] = False
    """Whether its statistics run over the tokens of a batch."""

    def build(self, width: int) -> nn.Module:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


@part("layernorm")
class LayerNorm(Norm):
    """γ (x − mean x) / √(var x + ε) + β over the features of each token (Ba 2016); β is 0 without a `bias`."""

    eps: float = 1e-5
    bias: bool = True

    def build(self, width: int) -> nn.Module:
        return _LayerNorm(self, width)


class _LayerNorm(nn.Module):
    def __init__(self, spec: LayerNorm, width: int) -> None:
        super().__init__()
        self.spec, self.weight = spec, nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if spec.bias else None

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.spec.eps)


@part("rmsnorm")
class RMSNorm(Norm):
    """(offset + w) x / √(mean x² + ε) over the features of each token, w learned (Zhang 2019).

    With an `offset` of 1, w is what is learned beyond the plain norm, and weight decay draws towards that.
    """

    eps: float = 1e-6
    offset: float = 0.0

    def build(self, width: int) -> nn.Module:
        return _RMSNorm(self, width)


class _RMSNorm(nn.Module):
    def __init__(self, spec: RMSNorm, width: int) -> None:
        super().__init__()
        self.spec, self.weight = spec, nn.Parameter(torch.full((width,), 1 - spec.offset))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        if not self.spec.offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.spec.eps)
        weight = self.weight.to(wide(x)) + self.spec.offset  # in bf16 what is learned beyond 1 would lose its digits
        return F.rms_norm(x.to(wide(x)), weight.shape, weight, self.spec.eps).to(x.dtype)


@part("batchnorm")
class BatchNorm(Norm):
    """γ (x − mean x) / √(var x + ε) + β over all real tokens of the batch, padding left out (Ioffe 2015).

    Evaluation uses running means. In training a token's output depends on every other token of the batch, later ones
    too: it is here for the comparison that the papers make.
    """

    eps: float = 1e-5
    momentum: float = 0.1

    over_batch: ClassVar[bool] = True

    def build(self, width: int) -> nn.Module:
        return _BatchNorm(self, width)


class _BatchNorm(nn.BatchNorm1d):
    def __init__(self, spec: BatchNorm, width: int) -> None:
        super().__init__(width, spec.eps, spec.momentum)
        self.spec = spec

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        valid = context.valid() if context is not None and self.training else None
        real = x.flatten(0, -2) if valid is None else x[valid]
        if self.training and len(real) < 2:
            raise QkvError("a batch of fewer than 2 tokens has no variance to normalise by: give a larger one")
        y = super().forward(real)
        return y.view_as(x) if valid is None else torch.zeros_like(x).masked_scatter(valid[..., None], y)


@part("dyt")
class DyT(Norm):
    """γ tanh(α x) + β with one learned α: a norm that takes no statistics (Zhu 2025)."""

    alpha: float = 0.5

    def build(self, width: int) -> nn.Module:
        return _DyT(self, width)


class _DyT(nn.Module):
    def __init__(self, spec: DyT, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.alpha = nn.Parameter(torch.tensor(spec.alpha))
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias
