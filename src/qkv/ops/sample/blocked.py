"""Blocks first, then within a few of them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.ops.sample import naive

SUM = 512
"""Tokens in a block whose weights are summed: √V for a large vocabulary, so that both levels are as long."""
MAX = 64
"""Tokens in a block whose largest is sought: √(V/k) for some tens, so that maxima and candidates are as many."""
BELOW = 1 - 2**-24
"""The largest number below 1 in fp32: times a sum, it is below the sum."""


def argmax(x: Tensor) -> Tensor:
    """As `naive`."""
    V = x.shape[1]
    if V % SUM:
        x = F.pad(x, (0, -V % SUM), value=-math.inf)
    blocks = x.reshape(len(x), -1, SUM)
    block = blocks.amax(-1).argmax(-1)
    return block * SUM + chosen(blocks, block).argmax(-1)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `naive`: the k largest lie in the k blocks whose maxima are largest."""
    B, V = x.shape
    n = V // MAX
    if 2 * k > n:
        return naive.largest(x, k)
    blocks = x[:, : n * MAX].reshape(B, n, MAX)
    best = blocks.amax(-1).topk(k, -1).indices[..., None]
    near = blocks.gather(1, best.expand(-1, -1, MAX)).flatten(1)
    ids = (best * MAX + torch.arange(MAX, device=x.device)).flatten(1)
    if n * MAX < V:  # the rest is no block
        rest = torch.arange(n * MAX, V, device=x.device).expand(B, -1)
        near, ids = torch.cat((near, x[:, n * MAX :]), 1), torch.cat((ids, rest), 1)
    values, at = near.topk(k, -1)
    return values, ids.gather(1, at)


def weights(x: Tensor, m: Tensor, T: float) -> Tensor:
    """As `naive`, as powers of 2, which torch makes in a third of the time of powers of e."""
    w = (x - m).mul_(math.log2(math.e) / T)
    for row in w:
        row.exp2_()  # the last few of a call are rounded otherwise, so that each row has a call of its own
    return w


def mass(x: Tensor, m: Tensor, T: float) -> Tensor:
    """As `naive`."""
    return summed(weights(x, m, T)).sum(-1).cumsum(-1)[:, -1:]


def draw(w: Tensor, u: Tensor) -> Tensor:
    """As `naive`: the block, then what is left of u draws in it."""
    blocks = summed(w)
    sums = blocks.sum(-1)
    reached = sums.cumsum(-1)
    target = u[:, None] * reached[:, -1:]
    block = naive.first(reached, target)
    over = (reached.gather(1, block) - target) / sums.gather(1, block)
    block = block[:, 0]
    at = block * SUM + naive.draw(chosen(blocks, block), (1 - over[:, 0]).clamp(0, BELOW))
    return at.clamp(max=w.shape[1] - 1)


def summed(w: Tensor) -> Tensor:
    """w: B V → its blocks, B N 512, the last one filled with nothing."""
    V = w.shape[1]
    if V % SUM:
        w = F.pad(w, (0, -V % SUM))
    return w.reshape(len(w), -1, SUM)


def chosen(blocks: Tensor, block: Tensor) -> Tensor:
    """One block of each row: B N 512, B → B 512."""
    return blocks[torch.arange(len(block), device=block.device), block]
