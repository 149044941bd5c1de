"""Weights to blocks otherwise than llama.cpp's reference quantisers: nearer, or with one scale for a row."""

import torch
from torch import Tensor

from qkv.ops.blocks.dequantise import SLICE
from qkv.ops.blocks.layout import BLOCKS, size
from qkv.ops.blocks.quantise import eight_bits, four_bits, quantise, rounded

STARTS = (1.0, 0.9)
"""Shares of a block's range at which a search begins: weights at its ends are often better cut off."""
ROUNDS = 4


def fit(type: str, x: Tensor) -> Tensor:
    """As `quantise`, but the scale and the minimum of Q4_1 are searched for.

    On the matrices of a trained encoder the squared error is 17 % below that of the least and the largest weight; it
    is never above it. Q8_0 has nothing to gain: half a step in 127 is what is lost.
    """
    return rounded(type, x, nearest) if type == "Q4_1" else quantise(type, x)


def by_row(x: Tensor) -> Tensor:
    """As `quantise("Q8_0", x)` with d = max |x| / 127 of a whole row, an output channel, in each of its blocks.

    On the matrices of trained models the squared error is 2.5 to 3 times that of a scale for each 32. A larger weight
    than 127 d is not cut off: not a row of them came nearer to its weights by that.
    """
    bytes, width = size("Q8_0", x.shape[-1:]), x.shape[-1]
    parts = []
    for rows in x.detach().cpu().reshape(-1, width).split(max(1, SLICE // width)):
        d = rows.float().abs().amax(1, keepdim=True) / 127
        blocks = rows.float().reshape(-1, BLOCKS["Q8_0"].weights)
        parts.append(eight_bits(blocks, d.repeat_interleave(len(blocks) // len(rows), 0)))
    return torch.cat(parts).view(*x.shape[:-1], bytes)


def nearest(x: Tensor) -> Tensor:
    """n × 32 weights → n × 20 bytes, w = d q + m with a small Σ (d q + m − x)².

    Integers are rounded for a scale and a minimum, these are fitted to the integers by least squares, and again: the
    error falls until nothing moves (Lloyd 1982). The best of all rounds counts, as the 16 bits of d and m hold it.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for share in STARTS:
        d, m = (high - low) * (share / 15), (low + high) / 2 - (high - low) * (share / 2)
        for left in reversed(range(ROUNDS + 1)):
            d, m = d.half().float(), m.half().float()
            q = integers(x, d, m)
            tried = (q * d).add_(m).sub_(x).square_().sum(1, keepdim=True), d, m
            best = (
                tuple(torch.where(tried[0] < best[0], *both) for both in zip(tried, best, strict=True))
                if best
                else tried
            )
            if left:
                d, m = line(x, q)
    _, d, m = best
    return four_bits(d, m, integers(x, d, m))


def integers(x: Tensor, d: Tensor, m: Tensor) -> Tensor:
    """The nearest of 0 … 15 to (x − m) / d."""
    return (x - m).mul_(torch.where(d > 0, 1 / d, 0)).round_().clamp_(0, 15)


def line(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """d and m of least Σ (d q + m − x)² for given q; d = 0 where all q are equal."""
    n, sums = x.shape[1], x.sum(1, keepdim=True)
    ones, squares, products = (t.sum(1, keepdim=True) for t in (q, q * q, q * x))
    spread = n * squares - ones * ones
    d = torch.where(spread > 0, (n * products - ones * sums) / spread.clamp(min=1), 0)
    return d, (sums - d * ones) / n
