"""Attention: every query reads a weighted mean of the values.

    O = softmax(cap(Q Kᵀ · scale) + bias, masked) V          cap(s) = c · tanh(s / c) with a softcap c, else s

Shapes: q is B H T K, k is B G S K, v is B G S V, and the output is B H T V; query head h reads group h // (H // G), so
G = H is multi-head, G = 1 multi-query and what lies between grouped-query attention. A mask is boolean, true where a
key may be seen; a bias is added to the scores; both broadcast to B H T S. Causal means that query i sees key j iff
j ≤ i + (S − T): the last query sees all. The softmax is computed in fp32 at least. A query with nothing to see gives
zeros and zero gradients.

One equation, three forms:

    naive   the equation read aloud; returns the weights too; any score function; O(T·S) memory.
    fused   one call of torch's scaled_dot_product_attention: the fast path of every day.
    tiled   exact in O(T + S) memory, forward and backward, with any mask, bias, softcap and dropout: for sequences of
            many hundred tokens, and for masks and biases that are functions and never stand as a T × S tensor.
"""

from qkv.ops.attention.fused import fused
from qkv.ops.attention.naive import Attended, naive
from qkv.ops.attention.tiled import tiled

__all__ = ["Attended", "fused", "naive", "tiled"]
