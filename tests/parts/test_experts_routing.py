"""Routers against the definitions and the transformers package; what is dropped, shared, and learned without a loss."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from qkv.context import Context, Tap
from qkv.errors import QkvError
from qkv.parts import BiasedTopK, Experts, FeedForward, Gated, NoisyTopK, PlainExperts, Router, TopK
from qkv.parts.activation import activation
from qkv.spec import dump, load
from tests.parts.helpers import run, seeded, wild

B, T, C, HIDDEN, E = 3, 11, 10, 7, 5
EMITTED = ("router", "scores", "experts", "gates", "load")


def tokens(seed: int = 0, rows: int = B) -> Tensor:
    return torch.randn(rows, T, C, dtype=torch.float64, generator=seeded(seed))


def emitted(body: nn.Module, x: Tensor, **given) -> dict[str, Tensor]:
    run(body, x, tap=(tap := Tap("f.*")), **given)
    return {path.removeprefix("f."): value for path, value in tap.values.items()}


def normal(body: nn.Module, std: float = 0.3) -> None:
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=std, generator=seeded(3))


# --- noisy top-k ---


def noisy(k: int = 2) -> nn.Module:
    return wild(Experts(HIDDEN, count=E, router=NoisyTopK(k)).build(C))


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("training", [True, False])
def test_gates_are_a_softmax_over_what_is_kept(k, training):
    body, x = noisy(k).train(training), tokens()
    torch.manual_seed(4)
    found = emitted(body, x)
    torch.manual_seed(4)
    noise = torch.randn(B, T, E, dtype=torch.float64)
    for b, t in [(0, 0), (1, 5), (2, 10)]:
        W, N = body.router.score.weight, body.router.noise.weight
        H = W @ x[b, t] + (noise[b, t] * torch.log1p((N @ x[b, t]).exp()) if training else 0.0)
        kept = torch.full_like(H, -math.inf)
        for e in sorted(range(E), key=lambda e: -H[e].item())[:k]:
            kept[e] = H[e]
        full = torch.zeros(E, dtype=torch.float64).scatter(0, found["experts"][b, t], found["gates"][b, t])
        torch.testing.assert_close(full, kept.softmax(0))
        torch.testing.assert_close(found["router"][b, t], H)
        torch.testing.assert_close(found["scores"][b, t], H.softmax(0))


def test_the_load_is_the_chance_of_being_chosen_with_other_noise():
    body, x, draws = noisy().train(), tokens(rows=1), 40000
    torch.manual_seed(4)
    found = emitted(body, x)
    W, N = body.router.score.weight, body.router.noise.weight
    clean, spread = x[0] @ W.t(), F.softplus(x[0] @ N.t())
    for t in range(T):
        for e in range(E):
            again = found["router"][0, t].expand(draws, E).clone()
            again[:, e] = clean[t, e] + spread[t, e] * torch.randn(draws, dtype=torch.float64, generator=seeded(e))
            chosen = (again.topk(2).indices == e).any(1).double().mean()
            assert abs(float(found["load"][0, t, e].detach() - chosen)) < 5 * 0.5 / draws**0.5
    assert torch.equal(emitted(noisy(E), x)["load"], torch.ones(1, T, E))


def test_the_load_teaches_both_matrices_and_the_gates_the_chosen():
    body = noisy().train()
    emitted(body, tokens())["load"][..., 0].sum().backward()
    assert body.router.score.weight.grad.any() and body.router.noise.weight.grad.any()
    assert body.up.grad is None


def test_noise_alone_spreads_the_first_tokens():
    body = Experts(HIDDEN, count=E, router=NoisyTopK()).build(C)
    assert not body.router.score.weight.any() and not body.router.noise.weight.any()
    x = torch.randn(1, 4000, C, generator=seeded())
    torch.manual_seed(0)
    counts = emitted(body.train(), x)["experts"].flatten().bincount(minlength=E)
    assert (counts - 1600).abs().max() < 200


def test_a_spread_of_zero_gives_numbers():
    body = noisy().train()
    with torch.no_grad():
        body.router.noise.weight.mul_(1e4)
    load = emitted(body, tokens())["load"]
    load.sum().backward()
    assert load.isfinite().all() and body.router.noise.weight.grad.isfinite().all()


# --- biased top-k ---


def test_it_is_deepseek_v3_s_block():
    config = DeepseekV3Config(
        hidden_size=C, moe_intermediate_size=HIDDEN, n_routed_experts=E, num_local_experts=E, num_experts_per_tok=2,
        n_group=1, topk_group=1, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    router = BiasedTopK(2, scale=2.5)
    theirs, ours = DeepseekV3MoE(config), Experts(HIDDEN, count=E, router=router, shared=Gated(2 * HIDDEN)).build(C)
    normal(ours)
    nn.init.normal_(ours.router.bias, std=0.3, generator=seeded(5))
    state = {
        "gate.weight": ours.router.score.weight,
        "gate.e_score_correction_bias": ours.router.bias,
        "experts.gate_up_proj": torch.cat((ours.gate, ours.up), 1),
        "experts.down_proj": ours.down,
        **{f"shared_experts.{n}_proj.weight": getattr(ours.shared, n).weight for n in ("gate", "up", "down")},
    }
    theirs.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    inputs = [tokens().float().requires_grad_() for _ in range(2)]
    outs = [run(ours.eval(), inputs[0]), theirs(inputs[1])]
    for out in outs:
        out.square().sum().backward()
    grads = [(ours.router.score.weight, theirs.gate.weight), (ours.down, theirs.experts.down_proj), tuple(inputs)]
    for found, expected in [tuple(outs), *((a.grad, b.grad) for a, b in grads)]:
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_bias_chooses_and_the_scores_weigh(score, normalise):
    router = BiasedTopK(2, score=score, normalise=normalise, scale=1.5)
    body = wild(Experts(HIDDEN, count=E, router=router).build(C))
    body.router.bias.copy_(torch.tensor([10.0, 0, 0, 0, -10]))
    found = emitted(body, tokens())
    s = (tokens() @ body.router.score.weight.t()).sigmoid() if score == "sigmoid" else found["router"].softmax(-1)
    assert (found["experts"][..., 0] == 0).all() and not (found["experts"] == 4).any()
    gates = s.gather(-1, found["experts"])
    expected = 1.5 * (gates / gates.sum(-1, keepdim=True) if normalise else gates)
    torch.testing.assert_close(found["gates"], expected)
    torch.testing.assert_close(found["scores"], s / s.sum(-1, keepdim=True))


def test_after_a_step_the_bias_moves_against_the_load():
    body = wild(Experts(HIDDEN, count=E, router=BiasedTopK(2, speed=0.25)).build(C))
    lengths, counts = torch.tensor([T, 4, 0]), torch.zeros(E)
    for seed in (0, 1):  # two batches whose gradients are accumulated
        experts = emitted(body.train(), tokens(seed), lengths=lengths)["experts"]
        counts += experts.flatten().bincount(minlength=E + 1)[:E]
    assert counts.sum() == 2 * 2 * 15 and len(set(counts.tolist())) > 2
    emitted(body.eval(), tokens(2))  # is not counted
    body.router.after_step()
    assert torch.equal(body.router.bias, 0.25 * (counts.mean() - counts).sign().double())
    before = body.router.bias.clone()
    body.router.after_step()
    assert torch.equal(body.router.bias, before)  # no batch, no change


def test_the_bias_balances():
    torch.manual_seed(0)
    body = Experts(HIDDEN, count=E, router=BiasedTopK(1, speed=0.02)).build(C).train()
    x = torch.randn(1, 500, C) + 1
    spread = []
    for _ in range(100):
        load = emitted(body, x)["experts"].flatten().bincount(minlength=E)
        spread.append(float(load.max() - load.min()))
        body.router.after_step()
    assert spread[-1] < 0.2 * spread[0]


# --- plain experts, capacity, shared experts ---


def plain_loop(body: nn.Module, x: Tensor, k: int, most: float) -> Tensor:
    """The definition, one choice of one token at a time; an expert that has taken `most` takes no more."""
    rows, taken = x.flatten(0, 1), [0] * E
    out = [torch.zeros(C, dtype=x.dtype) for _ in rows]
    p = (rows @ body.router.score.weight.t()).softmax(-1)
    for choice in range(k):
        for n, row in enumerate(rows):
            e = sorted(range(E), key=lambda e, n=n: -p[n, e].item())[choice]
            taken[e] += 1
            if taken[e] <= most:
                hidden = activation(body.spec.act)(body.up[e] @ row + body.up_bias[e])
                out[n] = out[n] + p[n, e] * (body.down[e] @ hidden + body.down_bias[e])
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("capacity", [None, 0.6, 1.0, 100.0])
def test_plain_experts_take_what_they_have_room_for(k, capacity):
    router, weight = TopK(k, normalise=False), tokens(2)
    body = wild(PlainExperts(HIDDEN, count=E, router=router, act="gelu", capacity=capacity).build(C)).train()
    found, most = [], math.inf if capacity is None else math.ceil(capacity * k * B * T / E)
    for form in (lambda x: run(body, x), lambda x: plain_loop(body, x, k, most)):
        body.zero_grad()
        x = tokens().requires_grad_()
        out = form(x)
        (out * weight).sum().backward()
        found.append([out.detach(), x.grad, *(p.grad.clone() for p in body.parameters())])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run(body.eval(), tokens()), plain_loop(body, tokens(), k, math.inf))


@pytest.mark.parametrize("most", [2, 64])
def test_it_is_the_switch_transformer_s_layer(most):
    config = SwitchTransformersConfig(
        d_model=C, d_ff=HIDDEN, num_experts=E, expert_capacity=most, dropout_rate=0.0, router_jitter_noise=0.0
    )
    theirs = SwitchTransformersSparseMLP(config).eval()
    router = TopK(1, normalise=False)
    ours = PlainExperts(HIDDEN, count=E, router=router, bias=False, capacity=most * E / T).build(C)
    normal(ours)
    state = {"router.classifier.weight": ours.router.score.weight}
    for e in range(E):
        state |= {f"experts.expert_{e}.wi.weight": ours.up[e], f"experts.expert_{e}.wo.weight": ours.down[e]}
    theirs.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    x = tokens(rows=1).float()
    expected = theirs(x)
    assert (run(ours.train(), x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected.abs().sum(-1) == 0).any() == (most == 2)  # some are dropped


def test_padding_takes_no_room():
    body = wild(Experts(HIDDEN, count=E, capacity=1.0).build(C)).train()
    x, lengths = tokens(), torch.tensor([T, 4, 0])
    out = run(body, x, lengths=lengths)
    x[1, 4:] = x[2] = 7.0
    assert torch.equal(run(body, x, lengths=lengths), out)
    alone = torch.cat((x[:1], x[1:2, :4]), 1)
    torch.testing.assert_close(run(body, alone)[0], torch.cat((out[0], out[1, :4])))


@pytest.mark.parametrize("shared", [Gated(6), FeedForward(6)], ids=str)
def test_shared_experts_read_every_token(shared):
    body = wild(Experts(HIDDEN, count=E, shared=shared).build(C))
    expected = run(body, tokens()) - body.shared(tokens())
    body.shared = None
    torch.testing.assert_close(run(body, tokens()), expected)


# --- all of them ---


@pytest.mark.parametrize("router", [TopK(), NoisyTopK(), BiasedTopK()], ids=str)
def test_the_kernel_computes_what_the_loop_does(router):
    """fp32 with widths that torch's grouped products take, fp64 with the loop."""
    found = []
    for dtype in (torch.float64, torch.float32):
        body = wild(PlainExperts(12, count=E, router=router, shared=Gated(4)).build(8)).eval().to(dtype)
        x = torch.randn(B, T, 8, dtype=torch.float64, generator=seeded()).to(dtype).requires_grad_()
        out = run(body, x)
        out.square().sum().backward()
        grads = [p.grad for p in body.parameters() if p.grad is not None]
        found.append([value.detach().double() for value in (out, x.grad, *grads)])
    for expected, one in zip(*found, strict=True):
        assert (one - expected).abs().max() <= 2e-4 * expected.abs().max()


@pytest.mark.parametrize("router", [TopK(), NoisyTopK(), BiasedTopK()], ids=str)
def test_padding_is_marked_in_what_is_emitted(router):
    body = wild(Experts(HIDDEN, count=E, router=router).build(C))
    lengths = torch.tensor([T, 4, 0])
    found = emitted(body, tokens(), lengths=lengths)
    assert set(found) == set(EMITTED) - ({"load"} if not isinstance(router, NoisyTopK) else set())
    real = torch.arange(T) < lengths[:, None]
    assert torch.equal((found["experts"] < E).all(-1), real) and (found["experts"][~real] == E).all()


@pytest.mark.parametrize("router", [TopK(), NoisyTopK(), BiasedTopK()], ids=str)
def test_there_must_be_as_many_experts_as_are_chosen(router: Router):
    assert load(dump(router)) == router
    with pytest.raises(QkvError, match="cannot go to 2 of 1 experts"):
        Experts(8, count=1, router=router).build(C)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BiasedTopK(score="sigmod"), "unknown score 'sigmod'; did you mean 'sigmoid'"),
        (lambda: BiasedTopK(speed=-1.0), "speed is not negative"),
        (lambda: BiasedTopK(scale=0.0), "scale above 0"),
        (lambda: Experts(8, count=4, capacity=0.0), "the capacity is above 0"),
        (lambda: PlainExperts(8, count=4, act="rellu"), "unknown activation"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(QkvError, match=words):
        make()


@pytest.mark.parametrize("router", [TopK(2), NoisyTopK(2), BiasedTopK(2)], ids=str)
def test_autocast_sends_no_token_elsewhere(router: Router):
    """A product in bf16 would send one token in a hundred to other experts."""
    torch.manual_seed(0)
    body = Experts(HIDDEN, count=64, router=router).build(512)
    normal(body.router)
    x, context = torch.randn(4, 500, 512, generator=seeded(2)), Context(torch.arange(500)[None])
    wanted = body.eval().router(x, context)
    with torch.autocast("cpu", torch.bfloat16):
        found = body.router(x, context)
    assert torch.equal(found.experts, wanted.experts) and torch.equal(found.gates, wanted.gates)


def test_loads_are_counted_beyond_what_bf16_can_count():
    router = BiasedTopK(1).build(C, E).to(torch.bfloat16)
    router.train()(torch.ones(1, 4000, C, dtype=torch.bfloat16), Context(torch.arange(4000)[None]))
    assert router.load.sum() == router.load.max() == 4000


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_router_is_pickled(score):
    router = BiasedTopK(2, score=score).build(C, E)
    again, x = pickle.loads(pickle.dumps(router)), torch.randn(1, T, C)
    assert torch.equal(again(x, Context(torch.arange(T)[None])).gates, router(x, Context(torch.arange(T)[None])).gates)


def test_a_compiler_may_run_it():
    body, x = wild(Experts(16, count=4).build(16)).float(), torch.randn(2, 8, 16)
    compiled = torch.compile(lambda x: run(body, x), backend="eager")
    torch.testing.assert_close(compiled(x), run(body, x))
