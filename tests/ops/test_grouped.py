"""Grouped products: both forms against an einsum over one-hot groups, in values and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.ops import grouped
from qkv.ops.blocks import fit
from qkv.ops.blocks.packed import Packed

LOADS = [3, 0, 7, 1, 0]


def inputs(width: int, outputs: int, dtype: torch.dtype, loads: list[int] = LOADS) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    shapes = ((sum(loads), width), (len(loads), outputs, width), (sum(loads), outputs))
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes]


def definition(x: Tensor, weight: Tensor, loads: list[int]) -> Tensor:
    groups = torch.arange(len(loads)).repeat_interleave(torch.tensor(loads))
    return torch.einsum("ne,nc,eoc->no", F.one_hot(groups, len(loads)).to(x.dtype), x, weight)


def found(form, x: Tensor, weight: Tensor, seed: Tensor, loads: list[int]) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = form(x, weight, loads)
    out.backward(seed)
    return [out.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("form", [grouped.naive, grouped.fused])
@pytest.mark.parametrize(
    ("width", "outputs", "dtype", "close"),
    [
        (5, 3, torch.float64, 1e-12),
        (8, 4, torch.float32, 1e-5),
        (8, 5, torch.float32, 1e-5),
        (8, 16, torch.bfloat16, 2e-2),
    ],
)
def test_values_and_gradients(form, width, outputs, dtype, close):
    x, weight, seed = inputs(width, outputs, dtype)
    expected = found(definition, x.double(), weight.double(), seed.double(), LOADS)
    for one, other in zip(found(form, x, weight, seed, LOADS), expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= close * other.abs().max()


@pytest.mark.parametrize("form", [grouped.naive, grouped.fused])
def test_no_rows_at_all(form):
    x, weight, _ = inputs(8, 4, torch.float32, [0, 0])
    assert form(x, weight, [0, 0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("shape", "dtype", "calls"),
    [
        ((5, 8, 4), torch.float32, 1),
        ((5, 8, 16), torch.bfloat16, 1),
        ((5, 6, 4), torch.float32, 0),  # rows of 24 bytes, which the gradient has
        ((5, 8, 12), torch.bfloat16, 0),
        ((5, 8, 4), torch.float64, 0),
    ],
)
def test_the_kernel_takes_what_it_can(shape, dtype, calls, monkeypatch):
    made, kernel = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *given, **more: made.append(1) or kernel(*given, **more))
    x, weight, _ = inputs(shape[2], shape[1], dtype)
    grouped.fused(x, weight, LOADS)
    assert len(made) == calls


def test_autocast_multiplies_in_its_own_numbers():
    x, weight, seed = inputs(8, 16, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = found(grouped.fused, x, weight, seed.bfloat16(), LOADS)
    expected = found(definition, x.double(), weight.double(), seed.double(), LOADS)
    assert [each.dtype for each in out] == [torch.bfloat16, torch.float32, torch.float32]
    for one, other in zip(out, expected, strict=True):
        assert (one.double() - other).abs().max() <= 2e-2 * other.abs().max()


def test_packed_weights():
    x, weight, _ = inputs(32, 4, torch.float32)
    packed = Packed("Q8_0", fit("Q8_0", weight))
    torch.testing.assert_close(grouped.fused(x, packed, LOADS), grouped.naive(x, packed.dequantise(), LOADS))
