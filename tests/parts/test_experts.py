"""Experts against the transformers package's Mixtral and against a loop over tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from qkv.context import Tap
from qkv.errors import QkvError
from qkv.parts import Experts, TopK
from qkv.parts.activation import activation
from qkv.parts.mixers import Body
from qkv.spec import dump, load
from tests.parts.helpers import run, seeded, wild

B, T, C, HIDDEN, E = 3, 11, 10, 7, 5


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(B, T, C, dtype=torch.float64, generator=seeded(seed))


def loop(body: Body, x: Tensor, k: int, normalise: bool, act: str) -> Tensor:
    """The definition, one token and one expert at a time."""
    rows = []
    for token in x.flatten(0, 1):
        p = (body.router.score.weight @ token).softmax(0)
        chosen = sorted(range(E), key=lambda e: -p[e].item())[:k]
        total = sum(p[e] for e in chosen) if normalise else 1.0
        made = (body.down[e] @ (activation(act)(body.gate[e] @ token) * (body.up[e] @ token)) for e in chosen)
        rows.append(sum(p[e] / total * y for e, y in zip(chosen, made, strict=True)))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_it_is_the_loop_over_tokens(k, normalise, act):
    body = wild(Experts(HIDDEN, count=E, router=TopK(k, normalise=normalise), act=act).build(C))
    found, weight = [], tokens(2)
    for form in (lambda x: run(body, x), lambda x: loop(body, x, k, normalise, act)):
        body.zero_grad()
        x = tokens().requires_grad_()
        out = form(x)
        (out * weight).sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in body.parameters())])
    # p sums to 1 where one expert is chosen and normalised, so that nothing but rounding teaches the router
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_outputs_and_gradients_are_mixtral_s():
    config = MixtralConfig(
        hidden_size=C, intermediate_size=HIDDEN, num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.0,
        experts_implementation="eager",
    )  # fmt: skip
    theirs, ours = MixtralSparseMoeBlock(config), Experts(HIDDEN, count=E).build(C)
    source = seeded(3)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3, generator=source)
    own = {
        "gate.weight": ours.router.score.weight,
        "experts.gate_up_proj": torch.cat((ours.gate, ours.up), 1),
        "experts.down_proj": ours.down,
    }
    theirs.load_state_dict({name: value.detach().clone() for name, value in own.items()})
    inputs = [tokens().float().requires_grad_() for _ in range(2)]
    outs = [run(ours, inputs[0]), theirs(inputs[1])]
    for out in outs:
        out.square().sum().backward()
    grads = {
        "gate.weight": ours.router.score.weight.grad,
        "experts.gate_up_proj": torch.cat((ours.gate.grad, ours.up.grad), 1),
        "experts.down_proj": ours.down.grad,
    }
    pairs = [outs, [x.grad for x in inputs], *([grads[name], p.grad] for name, p in theirs.named_parameters())]
    for found, expected in pairs:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_padding_is_sent_to_no_expert():
    body, x, lengths = wild(Experts(HIDDEN, count=E).build(C)), tokens(), torch.tensor([T, 4, 0])
    x[1, 4:] = x[2] = float("nan")
    out = run(body, x, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        assert not out[row, n:].any()
        if n:
            torch.testing.assert_close(out[row, :n], run(body, x[row : row + 1, :n])[0])
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for name, parameter in body.named_parameters() if "router" not in name)
    assert not run(body, x, lengths=torch.zeros(B, dtype=torch.long)).any()


def test_experts_without_tokens_learn_nothing():
    body = wild(Experts(HIDDEN, count=E, router=TopK(1, normalise=False)).build(C))
    with torch.no_grad():
        body.router.score.weight.zero_()[2] = 1.0
    run(body, tokens().abs()).sum().backward()
    for weight in (body.gate, body.up, body.down):
        assert [bool(gradient.any()) for gradient in weight.grad] == [e == 2 for e in range(E)]


def test_the_tap_gets_the_router_s_scores():
    body, tap = wild(Experts(HIDDEN, count=E).build(C)), Tap("f.router")
    run(body, tokens(), tap=tap)
    torch.testing.assert_close(tap["f.router"], F.linear(tokens(), body.router.score.weight))


def test_each_expert_starts_as_a_gated_feed_forward_would():
    torch.manual_seed(0)
    body = Experts(200, count=2).build(100)
    for weight in (*body.gate, *body.up, *body.down):
        assert abs(weight.detach().std().item() - (2 / 300) ** 0.5) < 1e-3
    assert {name: len(axes) for name, axes in body.axes.items()} == {"gate": 3, "up": 3, "down": 3}


def test_half_precision_goes_in_and_out():
    body = wild(Experts(HIDDEN, count=E).build(C)).float()
    whole = run(body, tokens().float())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(body, tokens().float())
    half = run(body.bfloat16(), tokens().bfloat16())
    assert (mixed.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert (mixed - whole).abs().median() < 0.01 * whole.abs().max()


def test_a_router_is_a_slot():
    spec = Experts(8, count=4, router=TopK(3, normalise=False))
    assert load(dump(spec)) == spec
    with pytest.raises(QkvError, match="cannot go to 5 of 4 experts"):
        Experts(8, count=4, router=TopK(5)).build(C)
    with pytest.raises(QkvError, match="at least 1"):
        Experts(8, count=0)
    with pytest.raises(QkvError, match="unknown activation"):
        Experts(8, count=4, act="rellu")


def test_without_values_it_costs_what_it_costs_with_them():
    costs = []
    for device in ("cpu", "meta"):
        with torch.device(device), FlopCounterMode(display=False) as counter:
            out = run(Experts(HIDDEN, count=E, router=TopK(2)).build(C), torch.ones(B, T, C))
        costs.append(counter.get_total_flops())
    assert out.shape == (B, T, C)
    assert costs == [2 * B * T * (C * E + 2 * 3 * C * HIDDEN)] * 2  # one router, and three products in two experts
