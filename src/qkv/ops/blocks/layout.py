"""How many weights and bytes a block has, and what the file format calls its type."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from qkv.errors import QkvError


@dataclass(frozen=True)
class Block:
    """A block format: its number in GGML, and the weights and bytes of a block."""

    id: int
    weights: int
    bytes: int


BLOCKS = {
    "F32": Block(0, 1, 4),
    "F16": Block(1, 1, 2),
    "BF16": Block(30, 1, 2),
    "Q4_0": Block(2, 32, 18),
    "Q4_1": Block(3, 32, 20),
    "Q5_0": Block(6, 32, 22),
    "Q5_1": Block(7, 32, 24),
    "Q8_0": Block(8, 32, 34),
    "Q2_K": Block(10, 256, 84),
    "Q3_K": Block(11, 256, 110),
    "Q4_K": Block(12, 256, 144),
    "Q5_K": Block(13, 256, 176),
    "Q6_K": Block(14, 256, 210),
}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Types of GGML that are not read here, so that an error can name them.
_OTHERS = (
    {4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
    | {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"}
    | {29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}
)
_NAMES = {block.id: name for name, block in BLOCKS.items()} | _OTHERS


def type_name(id: int) -> str:
    """The name of GGML's type number, whether or not it is read here."""
    return _NAMES.get(id, f"number {id}")


def size(type: str, shape: Sequence[int]) -> int:
    """The bytes of a tensor; `QkvError` for a type that is not known and for rows that are not whole blocks."""
    if type not in BLOCKS:
        raise QkvError(f"weights of type {type} are not supported: use {', '.join(BLOCKS)}")
    block = BLOCKS[type]
    row = shape[-1] if shape else 1
    if row % block.weights:
        raise QkvError(f"rows of {row} weights are not whole blocks of {type}, which hold {block.weights}")
    return prod(shape) // block.weights * block.bytes
