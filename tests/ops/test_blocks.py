"""Block formats against the reference in numpy of the gguf package."""

import gguf
import numpy as np
import pytest
import torch

from qkv.errors import QkvError
from qkv.ops.blocks import BLOCKS, dequantise, quantise, size, type_name

WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"]


def oracle(type: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type]


def random_blocks(type: str, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes, with numbers in half precision where they would not be finite."""
    data = np.random.default_rng(seed).integers(0, 256, (blocks, BLOCKS[type].bytes), dtype=np.uint8)
    if type not in ("F32", "F16", "BF16"):
        halves = data.view(np.float16)
        halves[~np.isfinite(halves)] = 0.5
    return data


def test_the_table_is_the_reference():
    for name, block in BLOCKS.items():
        assert (block.weights, block.bytes) == gguf.GGML_QUANT_SIZES[oracle(name)] and block.id == oracle(name)
    for kind in gguf.GGMLQuantizationType:
        if kind < 40:
            assert type_name(kind.value) == kind.name
    assert type_name(4_000_000_000) == "number 4000000000"


@pytest.mark.parametrize("type", BLOCKS)
def test_weights_are_the_references_bit_for_bit(type):
    block = BLOCKS[type]
    data = random_blocks(type, 3 * 5 * 7)
    with np.errstate(invalid="ignore"):
        expected = gguf.dequantize(data.reshape(15, -1), oracle(type)).reshape(3, 5, 7 * block.weights)
    for form in (data.reshape(15, -1), data.reshape(-1)):
        weights = dequantise(type, torch.from_numpy(form), (3, 5, 7 * block.weights))
        assert weights.dtype == torch.float32
        np.testing.assert_array_equal(weights.numpy(), expected)


@pytest.mark.parametrize("type", ["Q4_1", "Q6_K"])
def test_slices_join_and_other_dtypes_are_rounded_once(type):
    block = BLOCKS[type]
    data = random_blocks(type, 300_000 // block.weights)
    expected = torch.from_numpy(gguf.dequantize(data, oracle(type)))
    assert torch.equal(dequantise(type, torch.from_numpy(data), expected.shape), expected)
    assert torch.equal(dequantise(type, torch.from_numpy(data), expected.shape, torch.bfloat16), expected.bfloat16())


def test_a_float_type_is_a_view():
    data = torch.zeros(24, dtype=torch.uint8)
    dequantise("F32", data, (2, 3))[1, 2] = 1.0
    dequantise("BF16", data, (3, 4), torch.bfloat16)[0, 0] = 1.0
    assert data.nonzero().flatten().tolist() == [0, 1, 22, 23]


@pytest.mark.parametrize("type", WRITTEN)
@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0, 1e-9])
def test_bytes_are_the_references(type, scale):
    x = np.random.default_rng(1).normal(0, scale, (3, 1001, 96)).astype(np.float32)
    x[0, 0] = 0
    x[0, 1, :32] = np.resize([3 * scale, -3 * scale], 32)  # a tie of magnitudes: the first one counts
    x[0, 2, :32] = -scale  # no range
    x[1] = np.round(x[1] * 16 / scale) * scale / 16  # many halves to round
    expected = gguf.quantize(x, oracle(type)).view(np.uint8)
    ours = quantise(type, torch.from_numpy(x))
    assert ours.dtype == torch.uint8 and ours.shape == expected.shape
    np.testing.assert_array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_is_written_as_its_fp32(dtype):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype).t().contiguous().t()
    for type in ("F32", "Q8_0", "Q4_0", "Q4_1"):
        expected = gguf.quantize(x.float().contiguous().numpy(), oracle(type)).view(np.uint8)
        parameter = torch.nn.Parameter(x)
        np.testing.assert_array_equal(quantise(type, parameter).numpy(), expected)


def test_what_is_written_reads_back_near():
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for type, error in {"F32": 0, "F16": 1e-3, "BF16": 1e-2, "Q8_0": 0.02, "Q4_0": 0.4, "Q4_1": 0.25}.items():
        assert (dequantise(type, quantise(type, x), x.shape) - x).abs().max() <= error
    scalar = torch.tensor(2.5)
    assert torch.equal(dequantise("F16", quantise("F16", scalar), ()), scalar)


def test_weights_too_small_for_a_scale_become_nothing():
    x = torch.full((1, 32), 1e-44)
    x[0, 5] = -1e-44
    for type in ("Q8_0", "Q4_0", "Q4_1"):
        assert not dequantise(type, quantise(type, x), x.shape).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_weights_that_a_type_cannot_hold_are_refused(value):
    x = torch.ones(2, 32)
    x[1, 3] = value
    for type in ("F16", "Q8_0", "Q4_0", "Q4_1"):
        with pytest.raises(QkvError, match=f"not a finite number, or too large for {type}"):
            quantise(type, x)
    assert torch.equal(dequantise("F32", quantise("F32", x), (2, 32)).isfinite(), x.isfinite())


def test_refusals():
    with pytest.raises(QkvError, match="type IQ4_XS are not supported: use F32"):
        size("IQ4_XS", (2, 256))
    with pytest.raises(QkvError, match="rows of 40 weights are not whole blocks of Q4_0, which hold 32"):
        quantise("Q4_0", torch.zeros(4, 40))
    with pytest.raises(QkvError, match="can be written as F32, F16, BF16, Q8_0, Q4_0, Q4_1, not as Q4_K"):
        quantise("Q4_K", torch.zeros(1, 256))
    with pytest.raises(QkvError, match="35 bytes were given for weights of type Q8_0 that take 34"):
        dequantise("Q8_0", torch.zeros(35, dtype=torch.uint8), (32,))
    for type, at in {"Q4_0": 1, "Q4_1": 3, "Q8_0": 1, "Q6_K": 209}.items():
        damaged = torch.zeros(2, BLOCKS[type].bytes, dtype=torch.uint8)
        damaged[1, at] = 0x7E
        with pytest.raises(QkvError, match="a scale is not a finite number"):
            dequantise(type, damaged, (2, BLOCKS[type].weights))
