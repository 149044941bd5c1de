"""Weights in tiles, and their products, against sums of fp64 written out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import QkvError
from qkv.native.library import ACTS, INPUT, OUTPUT, Kind, NormKind, lanes
from qkv.native.tiles import Arena, store_of
from qkv.ops.blocks import fields
from qkv.ops.blocks.layout import BLOCKS
from qkv.ops.blocks.packed import Packed
from tests.native.helpers import DENSE, FORMATS, run, weight

EXACT = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *DENSE}
"""Formats whose scales are halves already, or that have none."""
ROWS = [1, 2, 3, 5, 16, 17, 40]


def plain(w: Tensor) -> Tensor:
    return w.dequantise() if isinstance(w, Packed) else w.float()


def kept(w: Tensor) -> Tensor:
    """The weights as the tiles have them: rows that an embedding looks up."""
    ids = torch.arange(len(w), dtype=torch.int32)
    op = {"kind": Kind.EMBED, "out": OUTPUT, "outputs": w.shape[1], "store": store_of(w), "weight": Arena().tiles([w])}
    return run([op], [0, w.shape[1]], len(w), tokens=ids)


def widths(format: str) -> list[int]:
    return [1, 7, 33, 100] if format in DENSE else [BLOCKS[format].weights, 3 * BLOCKS[format].weights]


@pytest.mark.parametrize("format", [*DENSE, *FORMATS])
def test_rows_of_tiles_are_the_weights(format: str) -> None:
    for outputs in (1, 16, 37):
        for inputs in widths(format):
            w = weight(format, outputs, inputs)
            found, expected = kept(w), plain(w)
            if format in EXACT:
                assert torch.equal(found, expected)
                continue
            assert isinstance(w, Packed)
            inside = fields(format, w.blocks.reshape(-1, BLOCKS[format].bytes))
            error = rounding(inside.d)[..., None] * inside.q.float().view(*inside.d.shape, -1).abs()
            error = error if inside.m is None else error + rounding(inside.m)[..., None]
            assert ((found - expected).abs().reshape(error.shape) <= error + 1e-6 * expected.abs().max()).all()


def rounding(scale: Tensor) -> Tensor:
    """How far a number is from the next one in half precision, at most."""
    return (scale.abs() * 2**-11).clamp(min=2**-25)


def test_a_scale_that_is_no_half_is_refused() -> None:
    w = weight("Q6_K", 3, 512)
    assert isinstance(w, Packed)
    w.blocks[2, 210 + 208 :] = torch.from_numpy(np.float16([60000.0]).view(np.uint8))
    w.blocks[2, 210 + 192] = 100
    with pytest.raises(QkvError, match="a scale of Q6_K weights is too large for half precision: load them deq"):
        Arena().tiles([w])


# --- products ---


def quantised(x: Tensor) -> Tensor:
    """x as the kernels read it: q · max|x| / 127 with whole q, for each 32 in a row; fp32 steps, in fp64."""
    blocks = x.numpy().reshape(len(x), -1, 32)
    most = np.abs(blocks).max(2, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    q = np.rint(blocks * inverse).astype(np.float64)
    return torch.from_numpy((q * (most / np.float32(127)).astype(np.float64)).reshape(x.shape))


def read(w: Tensor, x: Tensor) -> Tensor:
    """x as a product with w reads it, in fp64."""
    return quantised(x) if isinstance(w, Packed) else x.to(w.dtype).double()


def naive(w: Tensor, x: Tensor) -> Tensor:
    return read(w, x) @ kept(w).double().t()


def product(
    ws: list[Tensor], given: Tensor, outputs: int, threads: int = 1, gated: bool = False, **more: Any
) -> Tensor:
    """A LINEAR record by itself, that reads `given` and writes to an output which is wider than it needs."""
    op = {
        "kind": Kind.LINEAR, "in": INPUT, "out": OUTPUT, "inputs": ws[0].shape[1], "outputs": sum(map(len, ws)),
        "store": store_of(ws[0]), "weight": Arena().tiles(ws, gated=gated), "gated": gated, **more,
    }  # fmt: skip
    return run([op], [given.shape[1], outputs], len(given), threads, input=given)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("format", [*DENSE, *FORMATS])
@pytest.mark.parametrize("outputs", [16, 40, 100])
def test_products_are_sums_and_rows_do_not_see_each_other(format: str, outputs: int) -> None:
    for inputs in widths(format):
        w, x = weight(format, outputs, inputs), random(max(ROWS), inputs)
        x[3] = 0
        x[4, 0] = 300  # a text has such features
        whole = product([w], x, outputs)
        close(whole, naive(w, x))
        for n in ROWS:
            assert torch.equal(product([w], x[-n:].contiguous(), outputs), whole[-n:])
            assert torch.equal(product([w], x[:n].contiguous(), outputs, threads=2), whole[:n])


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softcap": lambda x: 3 * torch.tanh(x / 3),
}


def padded(bias: Tensor) -> Tensor:
    return F.pad(bias, (0, -len(bias) % lanes()))


@pytest.mark.parametrize("format", [*DENSE, "Q4_1", "Q8_0", "Q2_K", "Q6_K"])
@pytest.mark.parametrize("act", ACTS)
def test_what_a_product_does_besides(format: str, act: str) -> None:
    """act(W (scale x) + b) + residual, from and to columns of wider buffers."""
    outputs, inputs = 40, widths(format)[-1]
    w, given, b = weight(format, outputs, inputs), random(19, max(inputs, outputs) + 3), random(outputs, seed=2)
    size = naive(w, given[:, 3 : 3 + inputs].contiguous()).std()  # where functions bend
    x = given[:, 3 : 3 + inputs] * (scale := float(np.float32(2 / size)))
    expected = ACTIVATIONS[act](naive(w, x) + b.double()) + given[:, :outputs].double()
    more = {"bias": padded(b), "act": ACTS.index(act), "softcap": 3.0, "scale": scale, "residual": INPUT}
    for rows in (19, 1):
        found = product([w], given[:rows].contiguous(), 7 + outputs + 2, in_at=3, out_at=7, **more)
        close(found[:, 7:-2], expected[:rows])
        assert found[:, :7].isnan().all() and found[:, -2:].isnan().all()


@pytest.mark.parametrize("format", [*DENSE, *FORMATS])
@pytest.mark.parametrize("hidden", [16, 40])
def test_a_gate_multiplies(format: str, hidden: int) -> None:
    """(silu(W_g x + b_g) ⊙ (W x + b)) + residual, the biases of whole tiles in turn."""
    inputs = widths(format)[-1]
    gate, up, x = (
        weight(format, hidden, inputs),
        weight(format, hidden, inputs, seed=1),
        random(19, max(inputs, hidden)),
    )
    read = x[:, :inputs].contiguous()
    a, b = naive(gate, read), naive(up, read)
    bias = [random(hidden, seed=n) * float(one.std()) for n, one in ((2, a), (3, b))]
    tiles = torch.stack([padded(one).view(-1, lanes()) for one in bias], 1).flatten()
    expected = F.silu(a + bias[0].double()) * (b + bias[1].double()) + x[:, :hidden].double()
    more: dict[str, Any] = {"gated": True, "bias": tiles, "act": ACTS.index("silu"), "residual": INPUT}
    found = product([gate, up], x, hidden, **more)
    close(found, expected)
    assert torch.equal(product([gate, up], x[7:8].contiguous(), hidden, threads=2, **more), found[7:8])
    close(product([gate, up], x, hidden, gated=True), a * b)


def test_matrices_stand_side_by_side() -> None:
    ws, x = [weight("Q5_1", 32, 64), weight("Q5_1", 21, 64, seed=1)], random(5, 64)
    close(product(ws, x, 53), torch.cat([naive(w, x) for w in ws], 1))


# --- norms ---

NORMS: dict[NormKind, Callable[[Tensor, float], Tensor]] = {
    NormKind.RMS: lambda x, eps: x / (x.square().mean(-1, keepdim=True) + eps).sqrt(),
    NormKind.LAYER: lambda x, eps: (x - x.mean(-1, True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt(),
    NormKind.TANH: lambda x, eps: torch.tanh(eps * x),
    NormKind.AFFINE: lambda x, eps: x,
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [2, 15, 16, 17, 48, 100])
def test_norms(kind: NormKind, width: int) -> None:
    x, scale, shift, eps = 3 * random(9, width) + 2, random(width, seed=2), random(width, seed=3), 0.25
    normed = NORMS[kind](x.double(), eps) * scale.double() + shift.double()
    op: dict[str, Any] = {
        "norm": kind,
        "eps": eps,
        "norm_weight": scale,
        "norm_bias": shift,
        "in": INPUT,
        "inputs": width,
    }
    for threads in (1, 2):
        close(run([{"kind": Kind.NORM, "out": OUTPUT, **op}], [width, width], 9, threads, input=x), normed)
    added = {"kind": Kind.NORM, "out": OUTPUT, "residual": INPUT, **op}
    close(run([added], [width, width], 9, input=x), normed + x.double())
    buffer = [{"kind": Kind.NORM, "in": INPUT, "out": 2, "norm": NormKind.AFFINE, "inputs": width},
              {"kind": Kind.NORM, **op, "in": 2, "out": 2},
              {"kind": Kind.NORM, "in": 2, "out": OUTPUT, "norm": NormKind.AFFINE, "inputs": width}]  # fmt: skip
    close(run(buffer, [width, width, width], 9, input=x), normed)
    w = weight("F32", 5, width)
    close(product([w], x, 5, **{name: op[name] for name in ("norm", "eps", "norm_weight", "norm_bias")}),
          normed @ w.double().t())  # fmt: skip
