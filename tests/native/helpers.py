"""Records that run by themselves, and blocks to fill weights with."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.native.library import Call, Engine, Records
from qkv.ops.blocks.layout import BLOCKS, FLOATS
from qkv.ops.blocks.packed import Packed

FORMATS = [name for name in BLOCKS if name not in FLOATS]
DENSE = ["F32", "BF16"]


@cache
def engine(threads: int = 1) -> Engine:
    return Engine(threads)


def run(
    ops: Sequence[Mapping[str, Any]], widths: Sequence[int], rows: int, threads: int = 1, **given: Any
) -> torch.Tensor:
    """What the records write to the output of a program whose buffers have these widths; the rest of it stays NaN."""
    out = torch.full((rows, widths[1]), torch.nan)
    fields = {name: one.data_ptr() if isinstance(one, Tensor) else one for name, one in given.items()}
    engine(threads).run(Records(ops, widths, wide_cache=True), Call(rows=rows, output=out.data_ptr(), **fields))
    return out


def weight(format: str, outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """A matrix of random numbers, or of blocks of random bytes whose scales are finite and small."""
    if format in FLOATS:
        values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
        return values.to(FLOATS[format])
    block = BLOCKS[format]
    shape = outputs, inputs // block.weights * block.bytes
    data = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    halves = data.view(np.float16)
    halves[~(np.abs(halves) < 4)] = 0.5
    return Packed(format, torch.from_numpy(data))
