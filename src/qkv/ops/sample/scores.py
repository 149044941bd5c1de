"""Rows of scores, looked at as a whole once: then it is known which few of their blocks need looking at."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from qkv.ops.sample import naive

SUM = 512
"""Scores in a block whose weights are summed: √V for a large vocabulary, so that both levels are as long."""
MAX = 64
"""Scores in a block whose largest is sought: √(V/k) for some tens, so that maxima and candidates are as many."""
BELOW = 1 - 2**-24
"""The largest number below 1 in fp32: times a sum, it is below the sum."""


class Kernels(Protocol):
    """What looks at all scores x (B V, fp32): all else looks at a few. The last block of a row may be shorter."""

    def maxima(self, x: Tensor) -> Tensor:
        """The largest of each block: B ⌈V / MAX⌉."""

    def sums(self, x: Tensor, m: Tensor, T: float) -> Tensor:
        """Σ e^{(x_i − m)/T} over each block, m (B 1) the row's largest: B ⌈V / SUM⌉."""

    def largest(self, x: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest and where they stand, both B k, largest first, by the maxima of blocks."""


class InTorch:
    """The kernels that are always there."""

    def maxima(self, x: Tensor) -> Tensor:
        whole = x.shape[1] // MAX * MAX
        found = x[:, :whole].unflatten(1, (-1, MAX)).amax(-1)
        return found if whole == x.shape[1] else torch.cat((found, x[:, whole:].amax(-1, keepdim=True)), 1)

    def sums(self, x: Tensor, m: Tensor, T: float) -> Tensor:
        """Weights stand in memory a row at a time, as powers of 2: powers of e take torch three times as long."""
        V = x.shape[1]
        w = x.new_zeros(V + -V % SUM)
        inside, blocks, sums = w[:V], w.view(-1, SUM), list[Tensor]()
        for row, top in zip(x, m, strict=True):
            torch.sub(row, top, out=inside).mul_(math.log2(math.e) / T).exp2_()
            sums.append(blocks.sum(-1))
        return torch.stack(sums)

    def largest(self, x: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """They lie in the k blocks of largest maxima."""
        if 2 * k > maxima.shape[1]:
            return naive.largest(x, k)
        numbers = maxima.topk(k, -1).indices
        values, at = blocks(x, numbers, MAX).flatten(1).topk(k, -1)
        ids = numbers.gather(1, at // MAX) * MAX + at % MAX
        return values, ids.clamp(max=x.shape[1] - 1)  # where −∞ is among the largest, so is what fills a block


class Scores:
    """Scores x (B V), to choose from; what is found out about a whole row is kept for the next question.

    A row's answers, to the bit, do not depend on the rows beside it.
    """

    def __init__(self, x: Tensor, kernels: Kernels | None = None) -> None:
        self.x, self.kernels = x, kernels or InTorch()
        self.summed: dict[float, Tensor] = {}

    def __len__(self) -> int:
        return len(self.x)

    def changed(self, x: Tensor) -> "Scores":
        """Other scores in their place."""
        return self if x is self.x else Scores(x, self.kernels)

    def split(self, sizes: Sequence[int]) -> list["Scores"]:
        """Those of so many rows each, with what is known of them."""
        parts = [Scores(x, self.kernels) for x in self.x.split(sizes)]
        for part, maxima in zip(parts, self.maxima.split(sizes), strict=True):
            part.maxima = maxima
        for T, known in self.summed.items():
            for part, sums in zip(parts, known.split(sizes), strict=True):
                part.summed[T] = sums
        return parts

    @cached_property
    def maxima(self) -> Tensor:
        return self.kernels.maxima(self.x)

    @cached_property
    def m(self) -> Tensor:
        """The largest of each row: B 1."""
        return self.maxima.amax(-1, keepdim=True)

    def sums(self, T: float) -> Tensor:
        if T not in self.summed:
            self.summed[T] = self.kernels.sums(self.x, self.m, T)
        return self.summed[T]

    def mass(self, T: float) -> Tensor:
        """Σ_i e^{(x_i − m)/T}: B 1."""
        return self.sums(T).cumsum(-1)[:, -1:]

    def log_p(self, T: float = 1.0) -> Tensor:
        """(x − m)/T − log Σ_i e^{(x_i − m)/T}: B V."""
        return (self.x - self.m) / T - self.mass(T).log()

    def log_p_of(self, ids: Tensor, T: float = 1.0) -> Tensor:
        """The same of some places in each row: B n → B n."""
        return (self.x.gather(1, ids) - self.m) / T - self.mass(T).log()

    def argmax(self) -> Tensor:
        """The first of the largest of each row: B."""
        block = self.maxima.argmax(-1, keepdim=True)
        return block[:, 0] * MAX + blocks(self.x, block, MAX)[:, 0].argmax(-1)

    def largest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest and where they stand, both B k, largest first."""
        return self.kernels.largest(self.x, self.maxima, k)

    def draw(self, u: Tensor, T: float = 1.0) -> Tensor:
        """By u (B) in [0, 1), the first i with Σ_{j ≤ i} w_j > u Σ_j w_j, for w = e^{(x − m)/T}: B.

        The sums say which block it falls in; what is left of u, which of the block's. What weighs nothing is never
        drawn; a row of what is no number gives some place.
        """
        sums = self.sums(T)
        reached = sums.cumsum(-1)
        target = u[:, None] * reached[:, -1:]
        block = naive.first(reached, target)
        over = (reached.gather(1, block) - target) / sums.gather(1, block)
        inside = naive.weights(blocks(self.x, block, SUM)[:, 0], self.m, T).cumsum(-1)
        at = naive.first(inside, (1 - over).clamp(0, BELOW) * inside[:, -1:])
        return (block * SUM + at)[:, 0].clamp(max=self.x.shape[1] - 1)


def blocks(x: Tensor, numbers: Tensor, size: int) -> Tensor:
    """Some blocks of each row of x (B V): B n → B n size, filled up with −∞."""
    V = x.shape[1]
    at = (numbers[..., None] * size + torch.arange(size, device=numbers.device)).flatten(1)
    return x.gather(1, at.clamp(max=V - 1)).masked_fill_(at >= V, -math.inf).unflatten(1, (-1, size))
