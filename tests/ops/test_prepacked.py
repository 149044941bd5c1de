"""Packed weights in torch's own form, against the numbers that they stand for."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.native.helpers import weight
from tests.parts.helpers import seeded
from torch import Tensor

from qkv.ops.blocks import BLOCKS, packed, prepacked
from qkv.ops.blocks.packed import Packed

INPUTS = 512
OTHERS = [format for format in BLOCKS if format not in prepacked.FORMATS]


def made(format: str, outputs: int) -> Packed:
    found = weight(format, outputs, INPUTS)
    return found if isinstance(found, Packed) else Packed(format, found.view(torch.uint8))


def served(format: str, outputs: int) -> Packed:
    found = made(format, outputs)
    found.served = prepacked.prepacked(found)
    assert found.served is not None
    return found


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, INPUTS, generator=seeded(1))


@pytest.mark.parametrize("outputs", [16, 208])  # 208 = 3 × 64 + 16: whole layouts, and a rest
@pytest.mark.parametrize("format", prepacked.FORMATS)
def test_each_weight_is_as_near_as_a_bfloat(format: str, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepacked, "SLICE", 100 * INPUTS)  # turned 64 rows at a time
    w = served(format, outputs)
    found = torch.cat([F.linear(some, w) for some in torch.eye(INPUTS).split(packed.FEW)]).T
    plain = w.dequantise()
    most = plain.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
    assert ((found - plain).unflatten(1, (-1, 32)).abs() <= 2**-7 * most).all()


@pytest.mark.parametrize("format", prepacked.FORMATS)
def test_products_are_those_of_the_plain_matrix(format: str) -> None:
    w, x, bias = served(format, 80), rows(2, 5), torch.randn(80, generator=seeded(2))
    expected = F.linear(x.double(), w.dequantise().double(), bias.double())
    found = F.linear(x, w, bias)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert 0 < (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert all(torch.equal(F.linear(x[1, n], w, bias), found[1, n]) for n in range(5))  # alone as together
    assert torch.equal(F.linear(x.transpose(0, 1), w, bias), found.transpose(0, 1))
    assert F.linear(x.bfloat16(), w).dtype == torch.bfloat16 and F.linear(x[:0], w).shape == (0, 5, 80)


@pytest.mark.parametrize(("format", "outputs"), [*((one, 16) for one in OTHERS), ("Q4_0", 24), ("Q8_0", 5)])
def test_what_does_not_fit_is_left_alone(format: str, outputs: int) -> None:
    assert prepacked.prepacked(made(format, outputs)) is None


def test_stacked_matrices_and_other_processors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    one = made("Q4_1", 16)
    assert prepacked.prepacked(torch.stack([one, one])) is None
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert prepacked.prepacked(one) is None


def test_many_rows_and_gradients_take_the_exact_weights() -> None:
    w = served("Q4_0", 16)
    for x in (rows(packed.FEW + 1), rows(2).requires_grad_()):
        assert torch.allclose(F.linear(x, w), F.linear(x, w.dequantise()), rtol=1e-5, atol=1e-3)


def test_blocks_that_are_moved_forget_it() -> None:
    w = served("Q4_0", 32)
    for moved in (w[:16], w.bfloat16(), w.detach(), copy.deepcopy(w)):
        assert isinstance(moved, Packed) and moved.served is None
