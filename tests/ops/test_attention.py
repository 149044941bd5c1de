"""The three forms of attention: naive against a loop, fused and tiled against naive, values and every gradient."""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qkv.errors import QkvError
from qkv.ops.attention import fused, naive, tiled

B, H, K, V = 2, 4, 8, 6
LENGTHS = [*itertools.product([1, 63, 64, 65], repeat=2), (130, 70), (70, 130)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(T, S, G=H, dtype=torch.float64, width=K, value=V) -> tuple[Tensor, Tensor, Tensor]:
    q, k = torch.randn(B, H, T, width, dtype=dtype), torch.randn(B, G, S, width, dtype=dtype)
    return q * 2, k, torch.randn(B, G, S, value, dtype=dtype)


def loop(q, k, v, mask, bias, scale, softcap=None, score=None):
    """The definition, one query at a time; an independent oracle."""
    T, S, shared = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros(B, H, T, v.shape[-1], dtype=q.dtype)
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        keys = [j for j in range(S) if mask[b, h, i, j]]
        scores = []
        for j in keys:
            dot = score(q[b, h, i], k[b, h // shared, j]) if score else float(q[b, h, i] @ k[b, h // shared, j]) * scale
            scores.append((softcap * math.tanh(dot / softcap) if softcap else dot) + float(bias[b, h, i, j]))
        total = sum(math.exp(s) for s in scores)
        for j, s in zip(keys, scores, strict=True):
            out[b, h, i] += math.exp(s) / total * v[b, h // shared, j]
    return out


def gradients(form, tensors, **options) -> list[Tensor]:
    """The output and the gradient of each tensor and of the bias, for one fixed random cotangent."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    if isinstance(options.get("bias"), Tensor):
        options["bias"] = options["bias"].detach().clone().requires_grad_()
        leaves.append(options["bias"])
    out = form(*leaves[:3], **options)
    out = getattr(out, "out", out)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def agree(form, tensors, **options):
    """The form and naive give the same output and the same gradients."""
    for found, expected in zip(gradients(form, tensors, **options), gradients(naive, tensors, **options), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def padding(S):
    """The second of two rows ends after half its keys."""
    return (torch.arange(S) < torch.tensor([[S], [(S + 1) // 2]])).view(B, 1, 1, S)


def scattered(T, S):
    """Half of all keys, and a third of the queries with nothing to see."""
    return (torch.rand(B, H, T, S) < 0.5) & (torch.arange(T) % 3 > 0).view(T, 1)


both = pytest.mark.parametrize("form", [fused, partial(tiled, tile=16)], ids=["fused", "tiled"])


# --- naive ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("G", [1, 2, H])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_naive_is_the_definition(G, softcap):
    q, k, v = inputs(5, 7, G)
    mask, bias = scattered(5, 7), torch.randn(H, 5, 7, dtype=torch.float64)
    found = naive(q, k, v, mask=mask, bias=bias, scale=0.7, softcap=softcap)
    torch.testing.assert_close(found.out, loop(q, k, v, mask, bias.expand(B, H, 5, 7), 0.7, softcap))
    assert found.weights.sum(-1).allclose(mask.any(-1).double())
    assert not found.weights[~mask].any()


@pytest.mark.parametrize(("T", "S"), [(1, 5), (4, 4), (3, 6), (6, 3)])
def test_causal_lets_the_last_query_see_every_key(T, S):
    q, k, v = inputs(T, S)
    lower = torch.tensor([[j <= i + S - T for j in range(S)] for i in range(T)]).expand(B, H, T, S)
    expected = loop(q, k, v, lower, torch.zeros(B, H, T, S), K**-0.5)
    for form in (naive, fused, tiled):
        out = form(q, k, v, causal=True)
        torch.testing.assert_close(getattr(out, "out", out), expected)


def test_a_score_function_replaces_the_dot_product():
    q, k, v = inputs(3, 5, G=2)
    w = torch.randn(K, dtype=torch.float64)

    def additive(q, k):
        return torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ w

    mask = scattered(3, 5)
    expected = loop(q, k, v, mask, torch.zeros(B, H, 3, 5), 1.0, score=lambda q, k: float(torch.tanh(q + k) @ w))
    torch.testing.assert_close(naive(q, k, v, mask=mask, score=additive).out, expected)
    with pytest.raises(QkvError, match="score function beside scale"):
        naive(q, k, v, score=additive, scale=1.0)


def test_naive_drops_from_what_multiplies_v_only():
    q, k, v = inputs(16, 16)
    found = naive(q, k, torch.eye(16, dtype=q.dtype).expand(B, H, 16, 16), dropout=0.5)
    dropped = found.out == 0
    assert 0.4 < dropped.double().mean() < 0.6
    torch.testing.assert_close(found.out, (2 * found.weights).masked_fill(dropped, 0))
    torch.testing.assert_close(found.weights, naive(q, k, v).weights)


# --- fused and tiled against naive ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), LENGTHS)
def test_lengths(form, causal, T, S):
    agree(form, inputs(T, S, G=2), causal=causal)


@both
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [None, (H, 37, 50), (1, H, 37, 50), (B, 1, 1, 50), (50,), (B, H, 37, 1)])
@pytest.mark.parametrize("mask", ["none", "padding", "scattered", "columns"])
def test_masks_and_biases(form, causal, bias, mask):
    T, S = 37, 50
    masks = {"none": None, "padding": padding(S), "scattered": scattered(T, S), "columns": torch.rand(S) < 0.5}
    bias = None if bias is None else torch.randn(bias, dtype=torch.float64)
    agree(form, inputs(T, S, G=2), causal=causal, mask=masks[mask], bias=bias)


@both
@pytest.mark.parametrize("G", [1, 2, H])
@pytest.mark.parametrize("value", [V, K])
def test_groups(form, G, value):
    """Per-head masks and biases too: the heads of a group share keys and nothing else."""
    tensors, bias = inputs(33, 40, G, value=value), torch.randn(H, 33, 40, dtype=torch.float64)
    agree(form, tensors, mask=scattered(33, 40), bias=bias, scale=0.3)
    agree(form, tensors, causal=True)


@both
@pytest.mark.parametrize("how", ["mask", "bias", "causal", "late"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_query_with_nothing_to_see_gives_zeros(form, how, dtype):
    """`late`: a row whose first keys, more than any kernel's block, are hidden is no empty row."""
    T, S = {"causal": (70, 60), "late": (20, 1100)}.get(how, (20, 60))
    mask = torch.ones(B, 1, T, S, dtype=torch.bool)
    mask[0, :, : T // 2, : 1050 if how == "late" else S] = False
    if how == "causal":
        options, empty = {"causal": True}, (torch.arange(T) < T - S).expand(B, T)
    elif how == "bias":
        options, empty = {"bias": torch.zeros(mask.shape).masked_fill(~mask, -math.inf)}, ~mask.any(-1)[:, 0]
    else:
        options, empty = {"mask": mask}, ~mask.any(-1)[:, 0]
    tensors = inputs(T, S, G=2, dtype=dtype, value=K)
    found = gradients(form, tensors, **options)
    assert torch.equal((found[0] == 0).all(-1).all(1), empty)
    assert not found[1].transpose(1, 2)[empty].any()
    for x, y in zip(found, gradients(naive, [x.double() for x in tensors], **options), strict=True):
        assert (x.double() - y).norm() <= {torch.bfloat16: 8e-3, torch.float32: 3e-6}.get(dtype, 1e-12) * y.norm()


def test_a_bias_that_is_not_differentiated():
    """torch then takes its flash path."""
    mask, bias = scattered(37, 50), torch.randn(H, 37, 50, dtype=torch.float64)
    tensors = inputs(37, 50, value=K)
    expected = gradients(lambda *x: naive(*x, mask=mask, bias=bias), tensors)
    for found, wanted in zip(gradients(lambda *x: fused(*x, mask=mask, bias=bias), tensors), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@both
def test_bf16_is_close_to_fp32(form):
    tensors = inputs(65, 80, G=2, dtype=torch.bfloat16)
    wide = [x.float() for x in tensors]
    bias = 10 * torch.randn(H, 65, 80)  # stays fp32: rounded to bf16 it would be wrong by hundredths
    mask = scattered(65, 80)
    found = gradients(lambda *x: form(*x, bias=bias, mask=mask), tensors)
    expected = gradients(lambda *x: naive(*x, bias=bias, mask=mask), wide)
    assert [x.dtype for x in found] == [torch.bfloat16] * 4
    for x, y in zip(found, expected, strict=True):
        assert (x.float() - y).norm() < 6e-3 * y.norm()  # bf16 itself rounds by up to 4e-3


@both
def test_a_bias_of_bf16(form):
    tensors, bias = inputs(20, 30, dtype=torch.bfloat16), torch.randn(H, 20, 30, dtype=torch.bfloat16)
    found = gradients(form, tensors, bias=bias)
    assert {x.dtype for x in found} == {torch.bfloat16}
    for x, y in zip(found, gradients(naive, [x.float() for x in tensors], bias=bias.float()), strict=True):
        assert (x.float() - y).norm() < 6e-3 * y.norm()


def test_tiled_is_exact_under_autocast():
    tensors = inputs(65, 80, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(lambda *x: tiled(*x, tile=16), tensors)
    for x, y in zip(found, gradients(naive, tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@both
def test_views_that_are_not_contiguous(form):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(33, 40, G=2))
    agree(form, (q, k, v), causal=True)
    one = [x[:1] for x in (q, k, v)]
    summed = [x.detach().clone().requires_grad_() for x in one]
    form(*summed).sum().backward()  # the gradient arrives as an expanded scalar
    for x, y in zip(summed, torch.autograd.grad(naive(*summed).out.sum(), summed), strict=True):
        torch.testing.assert_close(x.grad, y)


@pytest.mark.parametrize(("T", "S"), [(0, 3), (3, 0)])
def test_no_tokens(T, S):
    q, k, v = inputs(T, S)
    for form in (naive, fused, tiled):
        out = form(q, k, v, causal=True)
        assert torch.equal(getattr(out, "out", out), torch.zeros(B, H, T, V, dtype=q.dtype))


# --- what only tiled does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tile", [3, 16, None])
def test_softcap_and_tile_sizes(softcap, tile):
    bias = torch.randn(B, 1, 37, 50, dtype=torch.float64)
    options = {"bias": bias, "mask": scattered(37, 50), "softcap": softcap}
    agree(lambda *x, **o: tiled(*x, **o, tile=tile), inputs(37, 50, G=2), **options)


def test_masks_and_biases_as_functions():
    T, S = 70, 90
    rows, columns = torch.arange(T).view(T, 1) + S - T, torch.arange(S)
    window, distance = (rows - columns).abs() < 20, -0.1 * (rows - columns).abs().double()
    asked = []

    def mask(rows, columns):
        asked.append((rows, columns))
        part = window[rows, columns]
        return None if part.all() else part

    def bias(rows, columns):
        return distance[rows, columns]

    reference = {"mask": window, "causal": True}
    tensors = inputs(T, S, G=2)
    expected = gradients(lambda *x: naive(*x, bias=distance, **reference), tensors)
    found = gradients(lambda *x: tiled(*x, mask=mask, bias=bias, causal=True, tile=16), tensors)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    assert max(r.stop - r.start for r, _ in asked) <= 16 >= max(c.stop - c.start for _, c in asked)
    assert all(c.start < r.stop + S - T for r, c in asked)  # nothing is asked where causal has ruled already


@dataclass
class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, and the number of matrix products."""

    elements: int = 0
    products: int = 0

    def __post_init__(self):
        super().__init__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        self.products += operation.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm_)
        return made


def test_tiles_that_are_ruled_out_cost_no_product():
    q, k, v = inputs(64, 64)
    blocks = torch.block_diag(*[torch.ones(16, 16)] * 4).bool()
    counted = {}
    for name, options in {"all": {}, "causal": {"causal": True}, "mask": {"mask": blocks}}.items():
        with Largest() as seen:
            tiled(q, k, v, tile=16, **options)
        counted[name] = seen.products
    assert counted == {"all": 2 * 16, "causal": 2 * 10, "mask": 2 * 4}


def test_a_mask_without_values_rules_nothing_out():
    q, k, v = (x.to("meta") for x in inputs(64, 64))
    assert tiled(q, k, v, mask=torch.empty(64, 64, dtype=torch.bool, device="meta"), tile=16).shape == v.shape


def test_no_tensor_grows_with_the_square_of_the_length():
    T = 8192
    q, k, v = (torch.randn(1, 1, T, 4, requires_grad=True) for _ in range(3))

    def window(rows, columns):
        i, j = torch.arange(rows.start, rows.stop).view(-1, 1), torch.arange(columns.start, columns.stop)
        return j > i - 100

    with Largest() as seen:
        tiled(q, k, v, mask=window, causal=True, dropout=0.1).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))
    assert seen.elements < T * T / 8
    with Largest() as seen:
        naive(q[:, :, :64], k[:, :, :64], v[:, :, :64])
    assert seen.elements >= 64 * 64  # the counter does see a square


def test_gradcheck():
    q, k, v = (x[:1, :2].requires_grad_() for x in inputs(5, 7, width=3, value=2))
    bias = torch.randn(2, 1, 7, dtype=torch.float64, requires_grad=True)
    mask = scattered(5, 7)[:1, :2]

    def dropped(q, k, v, bias):
        torch.manual_seed(3)
        return tiled(q, k, v, bias=bias, mask=mask, softcap=2.0, dropout=0.3, tile=4)

    assert torch.autograd.gradcheck(dropped, (q, k, v, bias))


# --- dropout ----------------------------------------------------------------------------------------------------


def test_dropout_repeats_with_the_seed_and_differs_without():
    q, k, v = inputs(40, 40)

    def again(seed):
        torch.manual_seed(seed)
        return tiled(q, k, v, dropout=0.2, tile=16)

    assert torch.equal(again(1), again(1))
    assert not torch.equal(again(1), again(2))
    torch.manual_seed(1)
    assert not torch.equal(tiled(q, k, v, dropout=0.2), tiled(q, k, v, dropout=0.2))


@pytest.mark.parametrize("form", [fused, tiled])
@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_is_unbiased(form, dropout):
    q, k, v = inputs(24, 24, value=K)
    n = 400
    draws = torch.stack([form(q, k, v, dropout=dropout) for _ in range(n)])
    error = (draws.mean(0) - naive(q, k, v).out) / (draws.std(0) / n**0.5)
    assert error.abs().max() < 5.5  # standard errors, over 1,536 outputs
    assert 0.9 < error.std() < 1.1


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_drops_as_many_as_asked(dropout):
    q, k = torch.zeros(B, H, 512, 1), torch.zeros(B, H, 512, 1)
    out = tiled(q, k, torch.ones_like(k), dropout=dropout)  # each is the mean of 512 weights that are 0 or 1 / (1 - p)
    assert abs(out.mean() - 1) < 5 * (dropout / (1 - dropout) / (B * H * 512**2)) ** 0.5
    assert 0.9 < out.std() / (dropout / (1 - dropout) / 512) ** 0.5 < 1.1


@pytest.mark.parametrize("G", [1, H])
@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_dropout_has_the_gradient_of_what_it_dropped(G, dropout):
    T, S = 37, 50
    q, k, v = inputs(T, S, G)
    mask, bias = padding(S), torch.randn(H, T, S, dtype=torch.float64)
    seeded = {"mask": mask, "bias": bias, "causal": True, "dropout": dropout, "tile": 16}

    def drop(q, k, v, **options):
        torch.manual_seed(5)
        return tiled(q, k, v, **options)

    weights = naive(q, k, v, mask=mask, bias=bias, causal=True).weights
    left = drop(q, k, torch.eye(S, dtype=q.dtype).expand(B, G, S, S), **seeded)
    factor = torch.where(weights > 0, left / weights, 0.0)
    kept = factor[weights > 0] > 0
    assert abs(1 - kept.double().mean() - dropout) < 0.02
    torch.testing.assert_close(
        factor[factor > 0], torch.full_like(factor[factor > 0], 1 / (1 - dropout)), rtol=1e-4, atol=0
    )

    def given(q, k, v, bias):
        return (naive(q, k, v, mask=mask, bias=bias, causal=True).weights * factor) @ v.repeat_interleave(H // G, 1)

    expected = gradients(given, (q, k, v), bias=bias)
    for x, y in zip(gradients(drop, (q, k, v), **seeded), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


# --- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [naive, fused, tiled])
def test_mistakes_are_named(form):
    q, k, v = inputs(4, 5, G=3)
    with pytest.raises(QkvError, match="G a divisor of H"):
        form(q, k, v)
    q, k, v = inputs(4, 5)
    with pytest.raises(QkvError, match=r"k \(2, 4, 5, 7\)"):
        form(q, k[..., 1:], v)
    with pytest.raises(QkvError, match="called bias"):
        form(q, k, v, mask=torch.zeros(4, 5))
    with pytest.raises(QkvError, match="dropout 1"):
        form(q, k, v, dropout=1)
