"""Packed weights against the plain ones that they stand for."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.checkpoints.names import halved, regrouped
from qkv.checkpoints.weights import load_tensors, save_tensors
from qkv.errors import QkvError
from qkv.ops.blocks import BLOCKS
from qkv.ops.blocks import packed as packing
from qkv.ops.blocks.packed import Packed
from qkv.parts.linear import Linear

FORMATS = ["F16", "Q4_0", "Q5_1", "Q8_0", "Q3_K", "Q6_K"]
WIDTH = 256


def made(format: str, *rows: int, seed: int = 0) -> Packed:
    """Random bytes whose scales are finite and small."""
    block = BLOCKS[format]
    shape = (*rows, WIDTH // block.weights * block.bytes)
    data = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    halves = data.view(np.float16)
    halves[~(np.abs(halves) < 4)] = 0.5
    return Packed(format, torch.from_numpy(data))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which products are added up."""
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("format", FORMATS)
def test_products_and_rows_are_those_of_the_plain_matrix(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SLICE", 3 * WIDTH)  # 11 rows in slices of 3, the last one short
    weight, x, bias = made(format, 11), torch.randn(2, 5, WIDTH), torch.randn(11)
    plain = weight.dequantise()
    assert weight.shape == plain.shape == (11, WIDTH) and weight.dtype == torch.float32
    close(F.linear(x, weight, bias), F.linear(x, plain, bias))
    ids = torch.tensor([[0, 10, 3], [7, 7, 1]])
    assert torch.equal(F.embedding(ids, weight), plain[ids])
    assert torch.equal(weight, plain) and torch.equal(plain, weight) and torch.equal(weight.contiguous(), plain)
    plain[10, 255] += 1
    assert not torch.equal(weight, plain) and not torch.equal(weight, plain[:10])


def test_a_product_with_the_matrix_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SLICE", 3 * WIDTH)
    weight, x, out = made("Q4_1", 11), torch.randn(4, 11), torch.full((4, WIDTH), 7.0)
    close(torch.mm(x, weight), x @ weight.dequantise())
    torch.mm(x, weight, out=out)
    close(out, x @ weight.dequantise())
    with pytest.raises(QkvError, match="they are no activations themselves"):
        torch.mm(weight, torch.ones(WIDTH, 2))


def test_no_slice_is_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spied(format: str, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        seen.append(int(np.prod(shape)))
        return torch.zeros(shape, dtype=dtype)

    monkeypatch.setattr(packing, "SLICE", 4 * WIDTH)
    monkeypatch.setattr(packing, "dequantise", spied)
    F.linear(torch.ones(1, WIDTH), made("Q8_0", 10))
    assert seen == [4 * WIDTH, 4 * WIDTH, 2 * WIDTH]


@pytest.mark.parametrize("format", ["F16", "Q4_1", "Q4_K"])
def test_rows_move_as_they_do_in_the_plain_matrix(format: str) -> None:
    weight = made(format, 12)
    plain = weight.dequantise()
    for move in (
        lambda w: halved(w, 3, back=False),
        lambda w: halved(w, 3, back=True),
        lambda w: regrouped(w, 2, 1, back=False),
        lambda w: regrouped(w, 2, 1, back=True),
        lambda w: w.split([4, 8])[1],
        lambda w: torch.stack([w, w]).unbind()[1],
        lambda w: torch.cat([w[2:5], w[:1]]),
        lambda w: w.detach().clone(),
    ):
        moved = move(weight)
        assert isinstance(moved, Packed) and torch.equal(moved.dequantise(), move(plain))


def test_matrices_of_two_formats_join_as_plain_ones() -> None:
    a, b = made("Q8_0", 2), made("Q4_0", 3)
    joined = torch.cat([a, b])
    assert not isinstance(joined, Packed) and torch.equal(joined, torch.cat([a.dequantise(), b.dequantise()]))


def test_experts_are_taken_apart_into_matrices() -> None:
    stacked, x = made("Q8_0", 3, 5), torch.randn(4, WIDTH)
    for one, plain in zip(stacked.unbind(), stacked.dequantise(), strict=True):
        close(F.linear(x, one), F.linear(x, plain))


def layer(weight: Tensor) -> Linear:
    with torch.device("meta"):
        made = Linear(WIDTH, len(weight))
    made.load_state_dict({"weight": weight}, assign=True)
    return made


def test_a_layer_keeps_its_blocks_through_everything(tmp_path: Path) -> None:
    weight, x = made("Q8_0", 6), torch.randn(3, WIDTH)
    ours = layer(weight)
    assert isinstance(ours.weight, nn.Parameter) and isinstance(ours.weight, Packed)
    assert list(ours.state_dict()) == ["weight"] and "Q8_0" in repr(ours.weight)
    plain, expected = weight.dequantise(), F.linear(x, weight.dequantise())
    close(copy.deepcopy(ours)(x), expected)
    save_tensors(ours.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(load_tensors(tmp_path / "w.safetensors")["weight"], plain)
    ours.bfloat16()
    assert isinstance(ours.weight, nn.Parameter) and ours.weight.dtype == torch.bfloat16
    assert torch.equal(ours.weight.dequantise(), plain.bfloat16())
    assert ours(x.bfloat16()).dtype == torch.bfloat16
    close(ours.to(torch.float32)(x), expected)
    assert ours.weight.new_zeros(2, 3).shape == (2, 3) and type(ours.weight.new_zeros((2, 3))) is Tensor
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


def test_gradients_pass_through_frozen_blocks_alone() -> None:
    weight, x = made("Q4_0", 7), torch.randn(2, 3, WIDTH, requires_grad=True)
    bias, plain = torch.randn(7, requires_grad=True), weight.dequantise()
    out = torch.randn(2, 3, 7)
    found = torch.autograd.grad((F.linear(x, weight, bias) * out).sum(), (x, bias))
    expected = torch.autograd.grad((F.linear(x, plain, bias) * out).sum(), (x, bias))
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    for made_with in (layer(weight)(x), F.embedding(torch.tensor([1]), nn.Parameter(weight))):
        with pytest.raises(QkvError, match="cannot be trained: load the model dequantised"):
            made_with.sum().backward()


def test_what_cannot_be_done_is_said() -> None:
    weight = made("Q8_0", 4)
    for broken in (Tensor.t, Tensor.flatten, lambda w: w[:, :32], lambda w: w.split(32, 1)):
        with pytest.raises(QkvError, match="would break up the blocks"):
            broken(weight)
    for other in (lambda w: w + 1, lambda w: torch.ones(2, 4) @ w, lambda w: w.sum()):
        with pytest.raises(QkvError, match="is neither: load the model dequantised"):
            other(weight)
    with pytest.raises(QkvError, match="max_norm"):
        F.embedding(torch.tensor([1]), weight, None, 1.0)
    with pytest.raises(QkvError, match="not whole blocks"):
        Packed("Q8_0", torch.zeros(2, 33, dtype=torch.uint8))
