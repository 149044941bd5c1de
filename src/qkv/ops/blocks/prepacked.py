"""Packed weights as torch's own 4-bit product for the CPU takes them: fast on few rows, where no program can be had."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.ops.blocks.dequantise import fields
from qkv.ops.blocks.layout import BLOCKS
from qkv.ops.blocks.packed import SLICE, Packed

FORMATS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K")
"""Those whose scales are for 32 weights; torch knows none for 16."""

GROUP, OUTPUTS, TOGETHER = 32, 16, 64
"""Inputs of one scale; outputs come in multiples of 16, and are laid out by 64."""


@dataclass(frozen=True)
class Prepacked:
    """Weights d (q − 8) + m with q of 4 bits, d and m bfloat16 for each 32; wider ones are two such, side by side."""

    numbers: Tensor
    """O × C / 2 bytes for each of the two."""
    scales: Tensor
    """Groups × O × 2: d and m."""

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ with x rounded to bfloat16, summed in fp32; x: … C → … O."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        if rows.shape[1] < 2 * self.numbers.shape[1]:
            rows = torch.cat([rows, rows], 1)
        y = torch._weight_int4pack_mm_for_cpu(rows, self.numbers, GROUP, self.scales)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def prepacked(weight: Packed) -> Prepacked | None:
    """A packed matrix in torch's form; None where torch has none for it, or none that is fast on this processor."""
    fast = weight.device.type == "cpu" and "AVX" in torch.backends.cpu.get_cpu_capability()
    if not fast or weight.dim() != 2 or weight.format not in FORMATS or weight.shape[0] % OUTPUTS:
        return None
    step = max(1, SLICE // weight.shape[1] // TOGETHER) * TOGETHER
    parts = [turned(weight.format, some) for some in weight.blocks.split(step)]
    return Prepacked(torch.cat([part.numbers for part in parts]), torch.cat([part.scales for part in parts], 1))


def turned(format: str, blocks: Tensor) -> Prepacked:
    """Rows of blocks: d q + m = 16 d (h − 8) + d (l − 8) + m + 8 d, where q = 16 (h − 8) + l."""
    found = fields(format, blocks.reshape(-1, BLOCKS[format].bytes))
    q, d = (part.reshape(len(blocks), -1) for part in (found.q.int(), found.d))
    m = torch.zeros_like(d) if found.m is None else found.m.reshape(d.shape)
    if found.bits == 4 and found.m is None:
        q, m = q + 8, -8 * d
    halves = [(q & 15, d, m + 8 * d)]
    if found.bits > 4:
        halves.insert(0, ((q >> 4) + 8, 16 * d, torch.zeros_like(d)))
    numbers, d, m = (torch.cat(parts, 1) for parts in zip(*halves, strict=True))
    scales = torch.stack([d, m], -1).transpose(0, 1).bfloat16().contiguous()
    return Prepacked(torch._convert_weight_to_int4pack_for_cpu(numbers, 1), scales)
