"""Weights to blocks, byte for byte as llama.cpp's reference quantisers round them."""

from collections.abc import Callable

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.blocks.dequantise import SLICE
from qkv.ops.blocks.layout import BLOCKS, FLOATS, size


def quantise(type: str, x: Tensor) -> Tensor:
    """The bytes of a tensor: uint8, with the shape of x but for the last dimension, which is a row's bytes.

    F32, F16, BF16, Q8_0, Q4_0 and Q4_1 can be written. Raises QkvError for another type, for rows that are not whole
    blocks, and for weights that are not finite or that F16 (in blocks, the scale) cannot hold; F32 takes anything.
    """
    rows = (*x.shape[:-1], size(type, x.shape[-1:]))
    if type in FLOATS:
        weights = x.detach().to("cpu", FLOATS[type]).contiguous()
        if type != "F32":
            _finite(weights, type)
        return weights.view(-1).view(torch.uint8).view(rows)
    if type not in _ROUNDINGS:
        raise QkvError(f"weights can be written as {', '.join([*FLOATS, *_ROUNDINGS])}, not as {type}")
    return rounded(type, x, _ROUNDINGS[type])


def rounded(type: str, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """The bytes of a tensor whose blocks, n × weights in fp32, a function turns into n × bytes."""
    block, rows = BLOCKS[type], (*x.shape[:-1], size(type, x.shape[-1:]))
    weights = x.detach().cpu().reshape(-1, block.weights)
    blocks = torch.empty(len(weights), block.bytes, dtype=torch.uint8)
    step = SLICE // block.weights
    for at in range(0, len(weights), step):
        blocks[at : at + step] = rounding(weights[at : at + step].float())
    return blocks.view(rows)


def four_bits(d: Tensor, m: Tensor, q: Tensor) -> Tensor:
    """Blocks of Q4_1, n × 20 bytes, from scales and minima (n × 1) and integers (n × 32)."""
    return torch.cat([_half(d, "Q4_1"), _half(m, "Q4_1"), _nibbles(q)], 1)


def eight_bits(x: Tensor, d: Tensor) -> Tensor:
    """Blocks of Q8_0, n × 34 bytes, from weights (n × 32) and scales (n × 1): q = x / d, halves away from zero."""
    q = x * _inverse(d)
    whole = q.trunc()
    q = whole + (q - whole).mul_(2).trunc_()  # torch's own round takes halves to the even neighbour
    return torch.cat([_half(d, "Q8_0"), q.to(torch.int8).view(torch.uint8)], 1)


def _finite(numbers: Tensor, type: str) -> Tensor:
    if not numbers.isfinite().all():
        raise QkvError(f"a weight is not a finite number, or too large for {type}")
    return numbers


def _half(d: Tensor, type: str) -> Tensor:
    return _finite(d.half(), type).view(torch.uint8)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where all weights are so small that d or its inverse is nothing."""
    inverse = d.reciprocal()
    return torch.where(inverse.isfinite(), inverse, 0)


def _nibbles(q: Tensor) -> Tensor:
    q = q.to(torch.uint8).clamp_(max=15)
    return q[:, :16] | q[:, 16:] << 4


def _q4_0(x: Tensor) -> Tensor:
    """d = x̂ / −8 with x̂ the (first) weight of largest magnitude, q = ⌊x / d + 8.5⌋ at most 15."""
    d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
    q = (x * _inverse(d)).add_(8.5)
    return torch.cat([_half(d, "Q4_0"), _nibbles(q)], 1)


def _q4_1(x: Tensor) -> Tensor:
    """m = min x, d = (max x − m) / 15, q = ⌊(x − m) / d + 0.5⌋ at most 15."""
    m = x.amin(1, keepdim=True)
    d = (x.amax(1, keepdim=True) - m) / 15
    q = (x - m).mul_(_inverse(d)).add_(0.5)
    return four_bits(d, m, q)


def _q8_0(x: Tensor) -> Tensor:
    """d = max |x| / 127."""
    return eight_bits(x, x.abs().amax(1, keepdim=True) / 127)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
