"""Autocast is left aside where it would round, and meta tensors, which it does not know, pass."""

import torch

from qkv.ops import recall, scan
from qkv.ops.precision import as_given


def test_products_keep_the_type_of_their_factors():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with as_given(x):
            assert (x @ x).dtype == torch.float32


def test_memories_have_a_shape_without_numbers():
    q, v, g = (torch.empty(2, 3, 70, n, device="meta") for n in (5, 7, 1))
    for form in (recall.naive, recall.chunked):
        assert form(q, q, v, g[..., 0]).out.shape == v.shape
    x, B, A = (torch.empty(shape, device="meta") for shape in ((2, 70, 6), (2, 70, 5), (6, 5)))
    assert scan.chunked(x, x, A, B, B).out.shape == x.shape
