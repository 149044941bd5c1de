"""Where a document begins: what a recurrence asks of the mask, against the whole mask."""

import pytest
import torch

from qkv.context import Context
from qkv.masks import Causal, Full, Prefix, Same, Window
from qkv.parts.convolution import ShortConvolution
from qkv.parts.mixers.recurrence import LONG_AGO, ages
from tests.parts.helpers import seeded, wild


def context(mask, T, start=0, **given):
    return Context(torch.arange(start, start + T)[None], mask, start, given=given)


@pytest.mark.parametrize("T", [1, 2, 64, 65, 66, 150])
def test_ages_count_from_where_the_mask_breaks(T):
    segments = (torch.rand(3, T, generator=seeded()) < 0.1).int().cumsum(1)
    found = ages(context(Causal() & Same() & Window(9), T, segments=segments), T)
    if T == 1:
        assert found is None
        return
    for row in range(3):
        for t in range(T):
            same = segments[row, : t + 1] == segments[row, t]
            before = int(same.sum()) - 1
            assert found[row, t] == before if before < t else found[row, t] >= LONG_AGO


def test_an_unbroken_mask_is_one_document():
    assert ages(context(Causal(), 9), 9) is None
    assert ages(context(Full(), 9), 9) is None
    prefix = context(Causal() | Prefix(), 9, start=4, prefix=torch.tensor([3, 7]))
    assert (ages(prefix, 9) >= LONG_AGO).all()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_convolution_stops_at_a_document_s_first_token(size):
    conv = wild(ShortConvolution(6, size))
    x = torch.randn(2, 9, 6, dtype=torch.float64, generator=seeded())
    since = torch.tensor([LONG_AGO, LONG_AGO + 1, 0, 1, 2, 3, 0, 0, 1]).expand(2, -1)
    begun = conv(x[:, :3] + 1)
    found = conv(x, begun.taps, None, since).out
    pieces = [conv(x[:, :2], begun.taps), *(conv(y) for y in x[:, 2:].split([4, 1, 2], 1))]
    torch.testing.assert_close(found, torch.cat([piece.out for piece in pieces], 1))
