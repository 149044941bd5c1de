"""Grouped products: every group of rows is multiplied with a matrix of its own.

    y_n = W_{e(n)} x_n

Shapes: x is N C, its rows sorted by group; weight is E O C; loads says how many rows each of the E groups has, and may
hold zeros; y is N O.

One equation, two forms:

    naive   the equation, one product after the other: any type of number and any store of weights.
    fused   one call of torch's grouped_mm forward, and two backward. The gradient of the weights is written once, where
            that of a stack of products is first made in pieces. It takes plain weights of at most 32 bits whose rows
            fill whole 16 bytes, and leaves the others to `naive`.
"""

from qkv.ops.grouped.fused import fused
from qkv.ops.grouped.naive import naive

__all__ = ["fused", "naive"]
