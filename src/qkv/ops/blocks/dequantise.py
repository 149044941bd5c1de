"""Blocks to weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.blocks.layout import BLOCKS, FLOATS, size


@dataclass(frozen=True)
class Fields:
    """n blocks as what is in them: weights are d q + m, where each of a block's parts has its own d and m."""

    bits: int
    """4 where every q fits in a nibble, else 8."""
    q: Tensor
    """n × weights: int8; uint8 where there are minima."""
    d: Tensor
    """n × parts, fp32."""
    m: Tensor | None = None
    """n × parts, fp32; None is all 0."""

    def weights(self) -> Tensor:
        """n × weights, fp32."""
        parts = self.q.float().view(*self.d.shape, -1).mul_(self.d.unsqueeze(2))
        return (parts if self.m is None else parts.add_(self.m.unsqueeze(2))).flatten(1)


def fields(type: str, blocks: Tensor) -> Fields:
    """The integers, scales and minima of blocks (n × bytes, uint8) of a type that has them."""
    return _EQUATIONS[type](blocks)


SLICE = 1 << 16  # weights at a time: what is computed on the way stays in the cache, and leaves small holes in memory
SPARE = 64  # weights more than are due: where a tensor was, malloc puts one of its size only if there is room for more


def dequantise(type: str, data: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights of a tensor, computed in fp32 by the equation of its type and given in `dtype`.

    `data` is uint8, flat or rows × bytes. A float type that is `dtype` already stays a view of it. Raises QkvError
    for an unknown type, rows that are not whole blocks, another number of bytes, and a scale that is not finite.
    """
    expected = size(type, shape)
    if data.numel() != expected:
        raise QkvError(f"{data.numel()} bytes were given for weights of type {type} that take {expected}")
    if type in FLOATS:
        return data.reshape(-1).view(FLOATS[type]).view(tuple(shape)).to(dtype)
    block, equation = BLOCKS[type], _EQUATIONS[type]
    blocks = data.reshape(-1, block.bytes)
    count = len(blocks) * block.weights
    weights = torch.empty(count + SPARE, dtype=dtype, device=data.device)[:count].view(-1, block.weights)
    step = SLICE // block.weights
    for at in range(0, len(blocks), step):
        weights[at : at + step] = equation(blocks[at : at + step]).weights()
    return weights.view(tuple(shape))


def unpack(b: Tensor, bits: int, run: int) -> Tensor:
    """The fields of n × k bytes, n × (8k / bits): each run of bytes gives its lowest fields, then its next ones."""
    runs = b.reshape(len(b), -1, run)
    mask = (1 << bits) - 1
    return torch.stack([(runs >> shift) & mask for shift in range(0, 8, bits)], dim=2).flatten(1)


def _half(b: Tensor, at: int) -> Tensor:
    """The half-precision number at a byte of each block, n × 1, in fp32."""
    d = b[:, at : at + 2].contiguous().view(torch.float16).float()
    if not d.isfinite().all():
        raise QkvError("a scale is not a finite number: the file is damaged")
    return d


def _six_bits(b: Tensor) -> tuple[Tensor, Tensor]:
    """Scales s and minima m of 8 parts from 12 bytes: low 6 bits of s₀…₃ and m₀…₃, then 4 + 4 bits of s, m₄…₇.

    The two bits that s₄…₇ and m₄…₇ still lack are the upper ones of the first 8 bytes.
    """
    s, m, both = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    upper = torch.cat([(both & 15) | (s >> 2 & 48), (both >> 4) | (m >> 2 & 48)], 1)
    return torch.cat([s & 63, upper[:, :4]], 1), torch.cat([m & 63, upper[:, 4:]], 1)


def _q4_0(b: Tensor) -> Fields:
    return Fields(4, unpack(b[:, 2:], 4, 16).to(torch.int8).sub_(8), _half(b, 0))


def _q4_1(b: Tensor) -> Fields:
    return Fields(4, unpack(b[:, 4:], 4, 16), _half(b, 0), _half(b, 2))


def _q5_0(b: Tensor) -> Fields:
    q = unpack(b[:, 6:], 4, 16) | unpack(b[:, 2:6], 1, 1) << 4
    return Fields(8, q.to(torch.int8).sub_(16), _half(b, 0))


def _q5_1(b: Tensor) -> Fields:
    q = unpack(b[:, 8:], 4, 16) | unpack(b[:, 4:8], 1, 1) << 4
    return Fields(8, q, _half(b, 0), _half(b, 2))


def _q8_0(b: Tensor) -> Fields:
    return Fields(8, b[:, 2:].view(torch.int8), _half(b, 0))


def _q2_k(b: Tensor) -> Fields:
    s, m = b[:, :16] & 15, b[:, :16] >> 4
    return Fields(4, unpack(b[:, 16:80], 2, 32), _half(b, 80) * s, -(_half(b, 82) * m))


def _q3_k(b: Tensor) -> Fields:
    q = unpack(b[:, 32:96], 2, 32) | unpack(b[:, :32], 1, 32) << 2
    s = unpack(b[:, 96:104], 4, 8) | unpack(b[:, 104:108], 2, 4) << 4
    return Fields(4, q.to(torch.int8).sub_(4), _half(b, 108) * s.float().sub_(32))


def _q4_k(b: Tensor) -> Fields:
    s, m = _six_bits(b[:, 4:16])
    return Fields(4, unpack(b[:, 16:], 4, 32), _half(b, 0) * s, -(_half(b, 2) * m))


def _q5_k(b: Tensor) -> Fields:
    s, m = _six_bits(b[:, 4:16])
    q = unpack(b[:, 48:], 4, 32) | unpack(b[:, 16:48], 1, 32) << 4
    return Fields(8, q, _half(b, 0) * s, -(_half(b, 2) * m))


def _q6_k(b: Tensor) -> Fields:
    q = unpack(b[:, :128], 4, 64) | unpack(b[:, 128:192], 2, 32) << 4
    return Fields(8, q.to(torch.int8).sub_(32), _half(b, 208) * b[:, 192:208].view(torch.int8))


_EQUATIONS: dict[str, Callable[[Tensor], Fields]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
