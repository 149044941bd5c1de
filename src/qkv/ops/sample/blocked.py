"""Blocks first, then within a few of them."""

import math
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.ops.sample import naive

SUM = 512
"""Tokens in a block whose weights are summed: √V for a large vocabulary, so that both levels are as long."""
MAX = 64
"""Tokens in a block whose largest is sought: √(V/k) for some tens, so that maxima and candidates are as many."""
AT_ONCE = 1 << 19
"""Tokens of all rows whose log p is made together."""
BELOW = 1 - 2**-24
"""The largest number below 1 in fp32: times a sum, it is below the sum."""


def argmax(x: Tensor) -> Tensor:
    """As `naive`."""
    blocks = cut(x, -math.inf)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    return block[:, 0] * SUM + chosen(blocks, block).argmax(-1)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `naive`: the k largest lie in the k blocks whose maxima are largest."""
    B, V = x.shape
    n = V // MAX
    if 2 * k > n:
        return naive.largest(x, k)
    blocks = x[:, : n * MAX].reshape(B, n, MAX)
    best = blocks.amax(-1).topk(k, -1).indices
    near = blocks.gather(1, best[..., None].expand(-1, -1, MAX)).flatten(1)
    if n * MAX < V:  # the rest is one more block, and shorter
        near, best = torch.cat((near, x[:, n * MAX :]), 1), F.pad(best, (0, 1), value=n)
    values, at = near.topk(k, -1)
    return values, best.gather(1, at // MAX) * MAX + at % MAX


def log_p(x: Tensor, ids: Tensor) -> Tensor:
    """As `naive`, of few rows at a time: log p of all tokens stands in memory that is at hand."""
    few = max(1, AT_ONCE // x.shape[1])
    rows = zip(x.split(few), ids.split(few), strict=True)
    return torch.cat([-F.cross_entropy(z, some, reduction="none") for z, some in rows])


class Weights:
    """w_i = e^{(x_i − m)/T} of x (B V), where m (B 1) is the row's maximum, so that no weight overflows.

    They are summed when they are first asked for. A row's stand in memory only meanwhile; those of a block are made
    again to draw from it.
    """

    def __init__(self, x: Tensor, T: float) -> None:
        self.x, self.T = x, T

    @cached_property
    def m(self) -> Tensor:
        return self.x.amax(-1, keepdim=True)

    @cached_property
    def sums(self) -> Tensor:
        """Of each block: B N."""
        V = self.x.shape[1]
        w = self.x.new_empty(V + -V % SUM)
        w[V:].zero_()
        inside, blocks, sums = w[:V], w.view(-1, SUM), list[Tensor]()
        for row, top in zip(self.x, self.m, strict=True):
            powers(torch.sub(row, top, out=inside), self.T)
            sums.append(blocks.sum(-1))
        return torch.stack(sums)

    @property
    def summed(self) -> bool:
        """Whether it has been asked for them."""
        return "sums" in vars(self)

    @property
    def mass(self) -> Tensor:
        """As `naive`."""
        return self.sums.cumsum(-1)[:, -1:]

    def log_p(self, ids: Tensor) -> Tensor:
        """log (w_i / Σ w_j) of one place in each row: B → B."""
        return ((self.x.gather(1, ids[:, None]) - self.m) / self.T - self.mass.log())[:, 0]

    def draw(self, u: Tensor) -> Tensor:
        """As `naive`."""

        def inside(block: Tensor) -> Tensor:
            w = chosen(cut(self.x, -math.inf), block) - self.m
            for row in w:
                powers(row, self.T)
            return w

        return within(self.sums, inside, u).clamp(max=self.x.shape[1] - 1)


def draw(w: Tensor, u: Tensor) -> Tensor:
    """As `naive`."""
    blocks = cut(w, 0.0)
    return within(blocks.sum(-1), lambda block: chosen(blocks, block), u).clamp(max=w.shape[1] - 1)


def within(sums: Tensor, inside: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """A draw by the sums of blocks (B N), then, with what is left of u, by the weights inside the one it falls in."""
    reached = sums.cumsum(-1)
    target = u[:, None] * reached[:, -1:]
    block = naive.first(reached, target)
    over = (reached.gather(1, block) - target) / sums.gather(1, block)
    reached = inside(block).cumsum(-1)
    return (block * SUM + naive.first(reached, (1 - over).clamp(0, BELOW) * reached[:, -1:]))[:, 0]


def powers(x: Tensor, T: float) -> Tensor:
    """e^{x/T} of one row, in its place, as powers of 2, which torch makes in a third of the time of powers of e.

    The last few of a call are rounded otherwise, so that each row has a call of its own.
    """
    return x.mul_(math.log2(math.e) / T).exp2_()


def cut(x: Tensor, rest: float) -> Tensor:
    """x: B V → its blocks, B N 512, the last one filled up."""
    V = x.shape[1]
    if V % SUM:
        x = F.pad(x, (0, -V % SUM), value=rest)
    return x.reshape(len(x), -1, SUM)


def chosen(blocks: Tensor, block: Tensor) -> Tensor:
    """One block of each row: B N 512, B 1 → B 512."""
    return blocks.gather(1, block[..., None].expand(-1, 1, SUM))[:, 0]
