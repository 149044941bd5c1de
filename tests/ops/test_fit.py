"""Blocks found by search: what they hold by the gguf package, and how near they are."""

import sys

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.blocks import by_row, fit, quantise


def theirs(type: str, blocks: Tensor) -> Tensor:
    """The weights of blocks as the gguf package reads them."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[type]))


def errors(x: Tensor, blocks: Tensor) -> Tensor:
    """Σ (ŵ − w)² of each block, in fp64."""
    return (theirs("Q4_1", blocks).double() - x.double()).square().view(-1, 32).sum(1)


def drawn(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 96, generator=generator)
    return {"normal": x * 0.03, "outliers": x**3, "shifted": x + 7, "positive": x.abs(), "small": x * 1e-6}[kind]


@pytest.mark.parametrize("kind", ["normal", "outliers", "shifted", "positive", "small"])
def test_no_block_is_further_than_with_the_least_and_the_largest_weight(kind: str) -> None:
    x = drawn(kind)
    ours, usual = errors(x, fit("Q4_1", x)), errors(x, quantise("Q4_1", x))
    assert (ours <= usual * (1 + 1e-5)).all()
    assert ours.sum() < 0.93 * usual.sum()
    # Where the ends are kept a weight is half a step off at most, which bounds the best there is; 16 bits of d and m
    # are off by 2⁻¹¹ of themselves, or by half the least number that they hold.
    span = (x.view(-1, 32).amax(1) - x.view(-1, 32).amin(1)).double()
    slack = 2 * x.abs().amax() * 2**-11 + 16 * 2**-25
    assert (ours.sqrt() <= 32**0.5 * (span / 30 + slack)).all()


def test_it_is_near_the_best_there_is() -> None:
    """Against trying 40,000 pairs of a scale and a minimum for each of some blocks, most of which a search finds."""
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found, best = errors(x.float(), fit("Q4_1", x.float())), torch.zeros(24, dtype=torch.float64)
    for n, block in enumerate(x):
        low, high = block.min(), block.max()
        d = torch.linspace(0.6, 1.05, 200, dtype=torch.float64)[:, None, None] * (high - low) / 15
        m = low + torch.linspace(-0.05, 0.25, 200, dtype=torch.float64)[None, :, None] * (high - low)
        q = ((block - m) / d).round().clamp(0, 15)
        best[n] = (q * d + m - block).square().sum(-1).min()
    assert (found / best).mean() < 1.1 and (found / best).max() < 1.3
    assert (errors(x.float(), quantise("Q4_1", x.float())) / best).mean() > 1.25  # what there is to gain


def test_what_is_on_a_grid_stays_there() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (50, 32), generator=generator)
    q[:, 0], q[:, 1] = 0, 15
    d, m = (torch.rand(50, 1, generator=generator).half().float() for _ in range(2))
    x = q * d - m
    assert torch.equal(theirs("Q4_1", fit("Q4_1", x)), x)


def test_blocks_of_equal_weights() -> None:
    for value in (0.0, 0.25, -3.0, 1e-9):
        x = torch.full((2, 64), value)
        assert (theirs("Q4_1", fit("Q4_1", x)) - x).abs().max() <= 2e-9


def test_other_types_are_as_ever() -> None:
    x = torch.randn(5, 64)
    for type in ("Q8_0", "Q4_0", "BF16"):
        assert torch.equal(fit(type, x), quantise(type, x))
    assert fit("Q4_1", x.view(5, 2, 32)).shape == (5, 2, 20)
    assert torch.equal(fit("Q4_1", x.double()), fit("Q4_1", x))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_numbers_that_have_no_blocks(value: float) -> None:
    x = torch.randn(3, 32)
    x[1, 7] = value
    with pytest.raises(QkvError, match="not a finite number, or too large for Q4_1"):
        fit("Q4_1", x)
    with pytest.raises(QkvError, match="rows of 31 weights are not whole blocks"):
        fit("Q4_1", x[:, :31])


def test_a_row_has_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["qkv.ops.blocks.fit"], "SLICE", 7 * 96)  # 7 rows at a time
    x = drawn("outliers").view(20, 15, 96)
    x[3, 2] = 0
    found = theirs("Q8_0", by_row(x)).double()
    step = x.double().abs().amax(-1, keepdim=True) / 127
    assert found.shape == x.shape and ((found - x).abs() <= step * (0.5 + 127 * 2**-11)).all() and not found[3, 2].any()
    assert torch.equal(by_row(x[:, :, :32]), quantise("Q8_0", x[:, :, :32]))  # one block is a row
    with pytest.raises(QkvError, match="rows of 33 weights are not whole blocks of Q8_0"):
        by_row(torch.ones(2, 33))
    with pytest.raises(QkvError, match="not a finite number, or too large for Q8_0"):
        by_row(torch.tensor([[1.0] * 31 + [torch.inf]]))
