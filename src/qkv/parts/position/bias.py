"""Positions that are added to the scores."""

import math

import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts.position.position import Position, Positional
from qkv.spec import part


@part("alibi")
class ALiBi(Position):
    """Head h's score falls by m_h for each token of distance, m_h = 2^(−8h/H) (Press 2022)."""

    def build(self, heads: int, head_width: int) -> Positional:
        return _ALiBi(self, heads)


def slopes(heads: int) -> list[float]:
    """The geometric sequence for a power of two; else that of the power below, then every other one of twice it."""
    whole = 2 ** int(math.log2(heads))
    first = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    return first + [2 ** (-4 * h / whole) for h in range(1, 2 * (heads - whole), 2)]


class _ALiBi(Positional):
    def __init__(self, spec: ALiBi, heads: int) -> None:
        super().__init__(spec)
        self.slopes = slopes(heads)

    def bias(self, queries: Tensor, keys: Tensor, context: Context) -> Tensor:
        slope = torch.tensor(self.slopes, device=keys.device)[:, None, None]
        return -(queries - keys).abs()[:, None] * slope


@part("relative")
class Relative(Position):
    """A learned bias per head for each of `buckets` ranges of the distance k − q: exact near, logarithmic to `far`.

    Raffel 2020 (T5). `both` sides of the query have buckets of their own (an encoder), or only the past has.
    """

    buckets: int = 32
    far: int = 128
    both: bool = True

    def check(self) -> None:
        exact = self.buckets // (4 if self.both else 2)
        if exact < 1 or self.far <= exact:
            raise QkvError(
                f"{self.buckets} buckets tell {exact} distances apart one by one; far lies beyond, not at {self.far}"
            )

    def build(self, heads: int, head_width: int) -> Positional:
        return _Relative(self, heads)


class _Relative(Positional):
    spec: Relative

    def __init__(self, spec: Relative, heads: int) -> None:
        super().__init__(spec)
        self.weight = nn.Parameter(torch.empty(spec.buckets, heads))
        nn.init.normal_(self.weight, std=0.02)

    def bias(self, queries: Tensor, keys: Tensor, context: Context) -> Tensor:
        return self.weight[self.bucket(keys - queries)].permute(0, 3, 1, 2)

    def bucket(self, distance: Tensor) -> Tensor:
        """Distance k − q → bucket: the first half of a side exact, the second half logarithmic."""
        buckets, offset = self.spec.buckets, torch.zeros_like(distance)
        if self.spec.both:
            buckets //= 2
            offset = (distance > 0) * buckets
            distance = distance.abs()
        else:
            distance = -distance.clamp(max=0)
        exact = buckets // 2
        ratio = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.spec.far / exact)
        coarse = exact + (ratio * (buckets - exact)).long().clamp(max=buckets - 1 - exact)
        return offset + torch.where(distance < exact, distance, coarse)
