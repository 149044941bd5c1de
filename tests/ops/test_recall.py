"""The memory: naive against dense matrices, chunks against naive in values, every gradient and the last state."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qkv.errors import QkvError
from qkv.ops.recall import bonus, chunked, naive, running_max, weights

B, G, H, K, V = 2, 2, 4, 5, 7
GATES = ["none", "head", "token", "vector"]
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(T: int, gate: str = "vector", delta: bool = False, G: int = G) -> dict[str, Tensor]:
    torch.manual_seed(T)
    x = {name: torch.randn(B, n, T, d, dtype=torch.float64) for name, n, d in (("q", G, K), ("k", G, K), ("v", H, V))}
    shape = {"none": None, "head": (H,), "token": (B, H, T), "vector": (B, H, T, K)}[gate]
    if shape is not None:
        x["g"] = -3 * torch.rand(shape, dtype=torch.float64)
    if delta:  # erasing more than twice what a key holds would make the memory grow
        x["k"], x["beta"] = F.normalize(x["k"], dim=-1), 2 * torch.rand(B, H, T, dtype=torch.float64)
    return x | {"state": torch.randn(B, H, K, V, dtype=torch.float64)}


def dense(q, k, v, g=None, beta=None, state=None) -> tuple[Tensor, Tensor]:
    """The definition with matrices, one row, head and token at a time."""
    out, last = torch.zeros(v.shape, dtype=v.dtype), torch.zeros(B, H, K, V, dtype=v.dtype)
    g = torch.zeros(H, dtype=v.dtype) if g is None else g
    g = g[:, None] if g.dim() == 1 else g
    g = (g if g.dim() == 4 else g[..., None]).expand(B, H, v.shape[2], K)
    for b, h in itertools.product(range(B), range(H)):
        S = torch.zeros(K, V, dtype=v.dtype) if state is None else state[b, h]
        for t in range(v.shape[2]):
            key, rate = k[b, h * k.shape[1] // H, t], 1.0 if beta is None else float(beta[b, h, t])
            erase = torch.eye(K, dtype=v.dtype) - (0.0 if beta is None else rate * torch.outer(key, key))
            S = erase @ torch.diag(g[b, h, t].exp()) @ S + rate * torch.outer(key, v[b, h, t])
            out[b, h, t] = S.T @ q[b, h * q.shape[1] // H, t]
        last[b, h] = S
    return out, last


def gradients(form, x: dict[str, Tensor], **options) -> list[Tensor]:
    """Output, last state, and the gradient of everything that went in for fixed random cotangents."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    found = form(**leaves, **options)
    random = torch.Generator().manual_seed(7)
    loss = sum(
        (y * torch.randn(y.shape, generator=random, dtype=torch.float64)).sum() for y in (found.out, found.state)
    )
    return [found.out.detach(), found.state.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("G", [1, 2, H])
def test_naive_is_the_definition(gate, delta, G):
    x = inputs(6, gate, delta, G)
    found, expected = naive(**x), dense(**x)
    torch.testing.assert_close((found.out, found.state), expected, **EXACT)
    del x["state"]
    torch.testing.assert_close(naive(**x).out, dense(**x)[0], **EXACT)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True])
def test_chunks_are_the_recurrence(T, gate, delta):
    x = inputs(T, gate, delta)
    for found, expected in zip(gradients(chunked, x), gradients(naive, x), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("chunk", [1, 2, 16, 256])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    x = inputs(70, "vector", delta=True)
    torch.testing.assert_close(chunked(**x, chunk=chunk).out, naive(**x).out, **EXACT)


def test_segments_of_many_chunks_join():
    x = inputs(1090, "vector", delta=True)
    for found, expected in zip(gradients(chunked, x), gradients(naive, x), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("T", [1, 2, 65])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("delta", [False, True])
def test_weights_are_the_matrix_between_values_and_what_is_read(T, gate, delta):
    x = inputs(T, gate, delta, G=H if gate == "none" and not delta else G)
    del x["state"]
    v = x.pop("v")
    found = weights(**x)
    assert found.shape == (B, H, T, T)
    assert not found.triu(1).any()
    torch.testing.assert_close(found @ v, naive(v=v, **x).out, **EXACT)


def test_weights_of_nothing_forgotten_are_products():
    x = inputs(9, "none", G=H)
    torch.testing.assert_close(weights(x["q"], x["k"]), (x["q"] @ x["k"].mT).tril(), **EXACT)


@pytest.mark.parametrize("delta", [False, True])
def test_a_state_goes_on_where_it_stopped(delta):
    x = inputs(90, "token", delta)
    whole, outs, state = naive(**x), [], x.pop("state")
    for piece in zip(*(value.split([1, 64, 3, 22], 2) for value in x.values()), strict=True):
        found = chunked(**dict(zip(x, piece, strict=True)), state=state)
        outs, state = [*outs, found.out], found.state
    torch.testing.assert_close((torch.cat(outs, 2), state), (whole.out, whole.state), **EXACT)


@pytest.mark.parametrize("gate", ["token", "vector"])
@pytest.mark.parametrize("delta", [False, True])
def test_minus_infinity_begins_a_document(gate, delta):
    x = inputs(70, gate, delta)
    starts = [0, 1, 30, 64]
    x["g"][:, :, starts] = -math.inf
    found = gradients(chunked, x)
    state = x.pop("state")
    lengths = [1, 29, 34, 6]
    documents = zip(*(value.split(lengths, 2) for value in x.values()), strict=True)
    alone = [naive(**dict(zip(x, document, strict=True))).out for document in documents]
    torch.testing.assert_close(found[0], torch.cat(alone, 2), **EXACT)
    assert all(gradient.isfinite().all() for gradient in found)
    assert not found[-1].any()
    assert state.shape == found[-1].shape


@pytest.mark.parametrize("gate", ["token", "vector"])
@pytest.mark.parametrize("delta", [False, True])
def test_no_gradient_crosses_into_another_document(gate, delta):
    """Exactly none, of the gates too: a difference of sums over a chunk would leave their rounding."""
    x = inputs(70, gate, delta)
    x["g"][:, :, [11, 23, 50]] = -math.inf
    x = {name: value.requires_grad_() for name, value in x.items()}
    found = torch.autograd.grad(chunked(**x).out[:, :, 23:50].square().sum(), list(x.values()))
    for name, gradient in zip(x, found, strict=True):
        alone = gradient if name == "state" else torch.cat((gradient[:, :, :23], gradient[:, :, 50:]), 2)
        assert not alone.any(), name
        assert name == "state" or gradient[:, :, 24:50].any(), name


@pytest.mark.parametrize("gate", ["token", "vector"])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["weak", "strong", "both"])
def test_extreme_decays_in_single_precision(gate, delta, decay):
    x = inputs(700, gate, delta)
    strong, weak = torch.tensor(1e-6).double().log(), torch.tensor(-1e-7).double()
    rare = torch.rand(x["g"].shape) < 0.05
    x["g"] = {"weak": weak, "strong": strong, "both": torch.where(rare, strong, weak)}[decay].expand(x["g"].shape)
    x = {name: value.float() for name, value in x.items()}
    expected = gradients(naive, {name: value.double() for name, value in x.items()})
    for found, exact in zip(gradients(chunked, x), expected, strict=True):
        assert (found - exact).abs().max() < 1e-5 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("gate", "delta"), [("token", False), ("vector", True)])
def test_extreme_decays_of_long_texts(gate, delta):
    """Rows that decay weakly, strongly, both by turns, and anyhow; 16,384 tokens that come in half precision."""
    T, (least, most) = 16384, (math.log(1e-6), -1e-7)
    torch.manual_seed(0)
    shape = (1, T) if gate == "token" else (1, T, 4)
    weak, strong = torch.full(shape, most), torch.full(shape, least)
    both = torch.where(torch.rand(shape) < 0.05, strong, weak)
    any_ = -torch.exp(torch.rand(shape) * math.log(least / most)) * -most
    g = torch.stack((weak, strong, both, any_))
    q, k, v = (torch.randn(4, 1, T, 4) for _ in range(3))
    x = {"q": q, "k": F.normalize(k, dim=-1) if delta else k, "v": v}
    x = {name: value.bfloat16() for name, value in x.items()}
    x |= {"beta": torch.rand(4, 1, T)} if delta else {}
    exact = naive(g=g.double(), **{name: value.double() for name, value in x.items()})
    single = chunked(g=g, **{name: value.float() for name, value in x.items()})
    half = chunked(g=g, **x)
    for row in range(4):  # one whose memory hardly forgets holds numbers of another size
        for found, bound in ((single.out, 1e-5), (half.out, 5e-3)):
            assert (found[row] - exact.out[row]).abs().max() < bound * exact.out[row].abs().max()
        for found in (single.state, half.state):
            assert (found[row] - exact.state[row]).abs().max() < 1e-5 * exact.state[row].abs().max()


def test_half_precision_goes_in_and_out_and_the_state_stays_single():
    x = {name: value.bfloat16() for name, value in inputs(70, "token", delta=True).items()}
    found, exact = chunked(**x), naive(**{name: value.double() for name, value in x.items()})
    assert (found.out.dtype, found.state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.state.double(), exact.state, rtol=1e-4, atol=1e-4)
    x = {name: value.float() for name, value in x.items()}
    for form in (chunked, naive):
        with torch.autocast("cpu", torch.bfloat16):
            inside = form(**x)
        assert torch.equal(inside.out, form(**x).out)
        assert torch.equal(inside.state, form(**x).state)


# --- what stands around a memory ---


@pytest.mark.parametrize("T", [1, 2, 70])
def test_a_bonus_reads_before_it_writes(T):
    x, u = inputs(T, "vector", G=H), torch.randn(H, K, dtype=torch.float64)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[1, T // 2] = True
    x["g"][first.nonzero()[0, 0], :, first.nonzero()[0, 1]] = -math.inf
    S, out = x["state"], []
    for t in range(T):
        q, k, v, g = (x[name][:, :, t] for name in "qkvg")
        before = torch.where(first[:, t, None, None, None], 0, S)
        now = k[..., None] * v[..., None, :]
        out.append(torch.einsum("bhk,bhkv->bhv", q, before + u[:, :, None] * now))
        S = g.exp()[..., None] * S + now
    found = bonus(**x, u=u, first=first)
    torch.testing.assert_close((found.out, found.state), (torch.stack(out, 2), S), **EXACT)


@pytest.mark.parametrize("T", [1, 2, 7, 64, 65])
def test_a_running_maximum_is_the_recurrence(T):
    torch.manual_seed(T)
    f, i, m = -3 * torch.rand(B, H, T), 4 * torch.randn(B, H, T), torch.randn(B, H)
    f[0, 0, T // 2], i[1, :, T // 3] = -math.inf, -math.inf
    expected, now = [], m
    for t in range(T):
        now = torch.maximum(f[..., t] + now, i[..., t])
        expected.append(now)
    torch.testing.assert_close(running_max(f, i, m), torch.stack(expected, -1))


def test_what_does_not_fit_is_refused():
    x = inputs(4, "token", delta=True)
    for name, wrong in [("k", x["k"][:, :1]), ("v", x["v"][:, :3]), ("g", x["g"][:, :2]), ("beta", x["beta"][..., :1])]:
        with pytest.raises(QkvError, match="recall: found"):
            chunked(**{**x, name: wrong})
    with pytest.raises(QkvError, match="found a state"):
        naive(**{**x, "state": x["state"].mT})
    with pytest.raises(QkvError, match="power of two"):
        chunked(**x, chunk=48)
