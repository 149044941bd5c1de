"""Weights in blocks of few bits, as GGML keeps them: a block is a run of a row, with scales of its own.

    type   weights, bytes   weight w from its integer q         the block's bytes, in order
    F32       1       4     w = q                               IEEE 754, little-endian, as all numbers here
    F16       1       2     w = q
    BF16      1       2     w = q
    Q4_0     32      18     w = d (q − 8)                       d f16 · q 4 bits
    Q4_1     32      20     w = d q + m                         d f16 · m f16 · q 4 bits
    Q5_0     32      22     w = d (q − 16)                      d f16 · q high bit · q low 4 bits
    Q5_1     32      24     w = d q + m                         d f16 · m f16 · q high bit · q low 4 bits
    Q8_0     32      34     w = d q                             d f16 · q i8
    Q2_K    256      84     w = d sᵢ q − e mᵢ                   (s, m) 4 + 4 bits of 16 · q 2 bits · d f16 · e f16
    Q3_K    256     110     w = d (sᵢ − 32) (q − 4)             q high bit · q low 2 bits · s 6 bits of 16 · d f16
    Q4_K    256     144     w = d sᵢ q − e mᵢ                   d f16 · e f16 · (s, m) 6 bits of 8 · q 4 bits
    Q5_K    256     176     w = d sᵢ q − e mᵢ                   d f16 · e f16 · (s, m) 6 bits of 8 · q high · q low 4
    Q6_K    256     210     w = d sᵢ (q − 32)                   q low 4 bits · q high 2 bits · s i8 of 16 · d f16

i numbers the 8 or 16 equal parts of a block of 256. Fields of fewer than 8 bits are packed by runs of bytes: the lowest
fields of a whole run of bytes first, then their next (see `unpack`).
"""

from qkv.ops.blocks.dequantise import Fields, dequantise, fields
from qkv.ops.blocks.fit import by_row, fit
from qkv.ops.blocks.layout import BLOCKS, Block, size, type_name
from qkv.ops.blocks.quantise import quantise

__all__ = ["BLOCKS", "Block", "Fields", "by_row", "dequantise", "fields", "fit", "quantise", "size", "type_name"]
