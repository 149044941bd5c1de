"""RWKV-6 against the paper's formulas, token by token in fp64."""

import pytest
import torch
from torch import Tensor

from qkv.context import Context, Tap
from qkv.errors import QkvError
from qkv.masks import Causal, Same
from qkv.parts import ChannelMix, Rwkv6
from qkv.parts.mixers import Body
from tests.parts.helpers import run, seeded, wild

C, H, K, T = 24, 3, 8, 21
SPECS = {"time": Rwkv6(H, mix_rank=5, decay_rank=7), "channel": ChannelMix(40)}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(1), dtype=torch.float64)


def time_mix(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Peng 2024, eqs. 14 to 20, of one row T C."""
    S, before, out = torch.zeros(H, K, K, dtype=x.dtype), torch.zeros(C, dtype=x.dtype), []
    for now in x:
        lerped = now + (before - now) * p["mix_all"]
        ups, downs = p["mix_up"].split(5, 1), p["mix_down"].split(5)  # of rank 5
        r, w, k, v, g = (
            now + (before - now) * (p["mix"][s] + ups[s] @ torch.tanh(downs[s] @ lerped)) for s in range(5)
        )
        w = p["decay"] + p["decay_up.weight"] @ torch.tanh(p["decay_down.weight"] @ w)
        decay = torch.exp(-torch.exp(w)).view(H, K)
        r, k, v = ((p[f"{name}.weight"] @ y).view(H, K) for name, y in (("r", r), ("k", k), ("v", v)))
        wkv = []
        for h in range(H):
            outer = torch.outer(k[h], v[h])
            wkv.append(r[h] @ (S[h] + torch.diag(p["u"][h]) @ outer))
            S[h] = torch.diag(decay[h]) @ S[h] + outer
        y = torch.stack(wkv)
        y = ((y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 64e-5).sqrt()).flatten()
        gate = p["g.weight"] @ g
        out.append(p["o.weight"] @ ((y * p["norm_weight"] + p["norm_bias"]) * gate * torch.sigmoid(gate)))
        before = now
    return torch.stack(out)


def channel_mix(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """Peng 2024, eqs. 21 to 23."""
    before = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    k, r = (x + (before - x) * p[f"{name}_mix"] for name in "kr")
    return torch.sigmoid(r @ p["r.weight"].T) * (torch.relu(k @ p["k.weight"].T) ** 2 @ p["v.weight"].T)


@torch.no_grad()
@each
def test_both_halves_are_the_paper_s_formulas(spec):
    body, x = wild(spec.build(C), 0.3), tokens(2, T, C)
    formula = time_mix if isinstance(spec, Rwkv6) else channel_mix
    expected = torch.stack([formula(dict(body.named_parameters()), row) for row in x])
    torch.testing.assert_close(run(body, x, Causal()), expected)


@each
def test_documents_in_one_row_are_as_if_alone(spec):
    body, lengths = wild(spec.build(C), 0.3), [1, 66, 20, 2]
    x = tokens(2, sum(lengths), C).requires_grad_()
    segments = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    found = run(body, x, Causal() & Same(), given={"segments": segments})
    torch.testing.assert_close(found, torch.cat([run(body, y, Causal()) for y in x.split(lengths, 1)], 1))
    (gradient,) = torch.autograd.grad(found[:, 87:].sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[:, :87].any()


@torch.no_grad()
@each
def test_padding_may_hold_anything_and_states_are_counted(spec):
    body, lengths = wild(spec.build(C), 0.3), torch.tensor([T, 11, 1, 0])
    x, cell = tokens(4, T, C), body.new_cell(4, T, {})
    x[1, 11:], x[2, 1:], x[3] = torch.nan, torch.inf, torch.nan
    feed(body, x, cell, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = body.new_cell(1, T, {})
        if n:
            feed(body, x[row : row + 1, :n], alone)
        for name, value in alone.tensors().items():
            torch.testing.assert_close(cell.now[name][row], value[0])
    assert cell.needs([9] * 4, []) == sum(value.nbytes for value in cell.tensors().values())


def feed(body: Body, x: Tensor, cell, lengths: Tensor | None = None) -> Tensor:
    context = Context(torch.arange(x.shape[1])[None], Causal(), None, lengths)
    body.view, context.views = 0, [body.prepare(context, cell, x.shape[1])]
    return body(x, context, cell)


@each
def test_in_half_precision_the_state_stays_single(spec):
    body, x = wild(spec.build(C), 0.3).float(), tokens(2, T, C).float()
    whole = run(body, x, Causal())
    with torch.autocast("cpu", torch.bfloat16):
        automatic = run(body, x, Causal())
    automatic.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in body.parameters())
    cell = body.bfloat16().new_cell(2, T, {})
    with torch.no_grad():
        half = run(body, x.bfloat16(), Causal())
        feed(body, x.bfloat16(), cell)
    assert half.dtype == torch.bfloat16
    assert "S" not in cell.now or cell.now["S"].dtype == torch.float32
    for found in (half, automatic):
        assert (found - whole).square().mean() < 0.05**2 * whole.square().mean()


@torch.no_grad()
def test_the_weights_that_a_tap_sees_make_what_is_read():
    body, tap, x = wild(SPECS["time"].build(C), 0.3), Tap("f.weights"), tokens(2, T, C)
    body.norm_weight.fill_(1)
    body.norm_bias.fill_(0)
    out = run(body, x, Causal(), tap=tap)
    weights = tap["f.weights"]
    assert weights.shape == (2, H, T, T)
    assert not weights.triu(1).any()
    previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    _, _, _, v, g = body.streams(x, previous)
    read = weights @ body.v(v).unflatten(-1, (H, -1)).transpose(1, 2)
    read = torch.nn.functional.layer_norm(read, (K,), eps=64e-5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(body.o(read * torch.nn.functional.silu(body.g(g))), out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rwkv6(0), "at least 1"),
        (lambda: Rwkv6(4, mix_rank=0), "at least 1"),
        (lambda: Rwkv6(5).build(C), "5 heads do not divide the width 24"),
        (lambda: ChannelMix(0), "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(QkvError, match=message):
        make()
