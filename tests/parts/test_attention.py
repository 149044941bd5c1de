"""Attention as a part: against torch's own module, against loops, and its long form against its short one."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from qkv.context import Context, Tap
from qkv.errors import QkvError
from qkv.masks import All, Causal, Edges, Full, Prefix, Same, Window
from qkv.ops import attention as ops
from qkv.parts import Additive, ALiBi, Attention, BatchNorm, Relative, RMSNorm, Rotary, ScaledDot
from tests.parts.helpers import run, seeded, wild

C, T, S = 12, 5, 7
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def heads(x: Tensor, n: int) -> Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (Attention(4, bias=True), 4 * C * C + 4 * C),
        (Attention(4), 4 * C * C),
        (Attention(4, kv_heads=1, bias=True), 2 * C * C + 2 * C * 3 + 2 * C + 2 * 3),
        (Attention(5, head_width=8), 4 * C * 40),
        (Attention(4, norm=RMSNorm(), score=Additive()), 4 * C * C + 3 + 3 + 4 * 3),
    ],
    ids=str,
)
def test_parameters(spec, count):
    body = spec.build(C)
    assert sum(p.numel() for p in body.parameters()) == count
    assert run(body, torch.randn(2, T, C)).shape == (2, T, C)


@pytest.mark.parametrize(
    ("options", "build"),
    [
        ({"heads": 5}, True),
        ({"heads": 6, "kv_heads": 4}, False),
        ({"heads": 0}, False),
        ({"heads": 4, "kv_heads": 0}, False),
        ({"heads": 4, "kv_heads": -2}, False),
        ({"heads": 4, "head_width": 0}, False),
        ({"heads": 4, "dropout": 1.5}, False),
        ({"heads": 4, "over": "memory", "mask": Window(2)}, False),  # a memory has no positions to compare with
        ({"heads": 4, "over": "memory", "position": Rotary()}, False),
        ({"heads": 4, "norm": BatchNorm()}, False),  # it is told nothing of padding here
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(options, build):
    with pytest.raises(QkvError):
        spec = Attention(**options)
        if build:
            spec.build(C)


# --- against torch's own module ---


def twins(over: str | None = None) -> tuple[nn.Module, nn.MultiheadAttention]:
    body, torchs = wild(Attention(3, bias=True, over=over).build(C)), nn.MultiheadAttention(C, 3, batch_first=True)
    parts = body.q, body.k, body.v
    torchs.double().load_state_dict(
        {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": body.o.weight,
            "out_proj.bias": body.o.bias,
        }
    )
    return body, torchs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [T, 2]], ids=str)
def test_self_attention_is_torchs(causal, lengths):
    body, torchs = twins()
    x, lengths = tokens(2, T, C).requires_grad_(), None if lengths is None else torch.tensor(lengths)
    valid = torch.arange(T) < (torch.tensor([T, T]) if lengths is None else lengths)[:, None]
    ours = run(body, x, Causal() if causal else Full(), lengths)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    theirs, weights = torchs(x, x, x, key_padding_mask=~valid, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(ours[valid], theirs[valid], **EXACT)
    cotangent = tokens(2, T, C, seed=1) * valid[..., None]
    gradients = [torch.autograd.grad(out, x, cotangent)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, **EXACT)
    tap = Tap("f.weights")
    torch.testing.assert_close(run(body, x, Causal() if causal else Full(), lengths, tap), ours, **EXACT)
    torch.testing.assert_close(tap["f.weights"].transpose(1, 2)[valid], weights.transpose(1, 2)[valid], **EXACT)
    torch.testing.assert_close(tap["f.weights"].sum(-1), torch.ones(2, 3, T).double())


@pytest.mark.parametrize("lengths", [None, [S, 3]], ids=str)
def test_cross_attention_is_torchs(lengths):
    body, torchs = twins(over="memory")
    x, memory = tokens(2, T, C), tokens(2, S, C, seed=1)
    given = {"memory": memory} | ({} if lengths is None else {"memory_lengths": torch.tensor(lengths)})
    hidden = None if lengths is None else torch.arange(S) >= torch.tensor(lengths)[:, None]
    theirs, _ = torchs(x, memory, memory, key_padding_mask=hidden)
    torch.testing.assert_close(run(body, x, Causal(), given=given), theirs, **EXACT)


def test_a_missing_memory_is_named():
    with pytest.raises(QkvError, match="needs the tensor 'memory'"):
        run(Attention(3, over="memory").build(C), torch.randn(2, T, C))


# --- its variants ---


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_queries_are_heads_that_share_keys_and_values(groups):
    few, many = wild(Attention(6, kv_heads=groups, bias=True).build(C)), wild(Attention(6, bias=True).build(C))
    state = few.state_dict()
    for name in ("k.weight", "k.bias", "v.weight", "v.bias"):
        state[name] = state[name].unflatten(0, (groups, -1)).repeat_interleave(6 // groups, 0).flatten(0, 1)
    many.load_state_dict(state)
    x = tokens(2, T, C)
    for mask, lengths in ((Causal(), None), (Full(), torch.tensor([T, 2]))):
        torch.testing.assert_close(run(few, x, mask, lengths), run(many, x, mask, lengths), **EXACT)


@pytest.mark.parametrize("score", [ScaledDot(), ScaledDot(scale=0.7), ScaledDot(scale=2.0, softcap=1.5)], ids=str)
@pytest.mark.parametrize("norm", [None, RMSNorm()], ids=str)
def test_scores_are_their_formula_and_queries_and_keys_are_normalised_by_head(score, norm):
    body, x = wild(Attention(3, score=score, norm=norm, head_width=5).build(C)), tokens(2, T, C)
    q, k, v = (heads(x @ part.weight.T, 3) for part in (body.q, body.k, body.v))
    if norm is not None:
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        q, k = q * body.q_norm.weight, k * body.k_norm.weight
    s = q @ k.mT * (5**-0.5 if score.scale is None else score.scale)
    s = s if score.softcap is None else score.softcap * torch.tanh(s / score.softcap)
    expected = (s.softmax(-1) @ v).transpose(1, 2).flatten(2) @ body.o.weight.T
    torch.testing.assert_close(run(body, x), expected, **EXACT)


@pytest.mark.parametrize("position", [Rotary(fraction=0.5), ALiBi(), Relative(buckets=6, far=9)], ids=str)
def test_a_position_turns_queries_and_keys_or_is_added_to_scores(position):
    body, x, at = wild(Attention(3, kv_heads=1, position=position).build(C)), tokens(2, T, C), torch.arange(T)[None]
    q, k, v = heads(x @ body.q.weight.T, 3), heads(x @ body.k.weight.T, 1), heads(x @ body.v.weight.T, 1)
    q, k = (body.position.rotate(y, body.position.table(at, Context(at), x.dtype)) for y in (q, k))
    bias = body.position.bias(at[:, :, None], at[:, None, :], Context(at))
    s = q @ k.mT / 2 + (0 if bias is None else bias)
    s = s.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    expected = (s.softmax(-1) @ v).transpose(1, 2).flatten(2) @ body.o.weight.T
    torch.testing.assert_close(run(body, x, Causal()), expected, **EXACT)


def test_an_additive_score_is_bahdanaus():
    body, x = wild(Attention(2, kv_heads=1, score=Additive()).build(C)), tokens(2, T, C)
    lengths, expected = torch.tensor([T, 3]), torch.zeros(2, T, C, dtype=torch.float64)
    for b, t in itertools.product(range(2), range(T)):
        out = []
        for h in range(2):
            q, keys = (body.q.weight @ x[b, t])[h * 6 : h * 6 + 6], range(int(lengths[b]))
            scores = torch.stack([body.score.v[h] @ torch.tanh(q + body.k.weight @ x[b, j]) for j in keys])
            values = torch.stack([body.v.weight @ x[b, j] for j in keys])
            out.append(scores.softmax(0) @ values)
        expected[b, t] = body.o.weight @ torch.cat(out)
    valid = torch.arange(T) < lengths[:, None]
    torch.testing.assert_close(run(body, x, Full(), lengths)[valid], expected[valid], **EXACT)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    body, x = wild(Attention(3, dropout=0.5).build(C)), tokens(1, T, C)
    torch.manual_seed(0)
    rows = run(body, x.expand(20000, T, C))
    still = run(body.eval(), x)
    assert not torch.allclose(rows[0], still[0])
    error = rows.std(0) / 20000**0.5
    assert ((rows.mean(0) - still[0]).abs() < 5 * error).all()


# --- long sequences ---

LONG = 40  # five rows of tiles, which the padding of the second row cuts
LONG_CASES = {
    "a causal window": (Attention(2), Causal() & Window(9), None),
    "a layer's own window": (Attention(2, mask=Window(9)), Causal(), None),
    "padding": (Attention(2), Full(), [LONG, 19]),
    "padding and a window": (Attention(2, kv_heads=1), Window(20), [LONG, 19]),
    "documents": (Attention(2), Same(), None),
    "documents, causal": (Attention(4, kv_heads=2), All((Causal(), Same())), None),
    "a prefix": (Attention(2), Causal() | Prefix(), None),
    "edges": (Attention(2), Edges(), None),
    "rotary": (Attention(2, position=Rotary()), Causal() & Window(30), None),
    "alibi": (Attention(2, position=ALiBi()), Full(), [LONG, 19]),
    "a learned bias": (Attention(2, position=Relative(buckets=8, far=40)), Full(), [LONG, 19]),
    "a softcap": (Attention(2, score=ScaledDot(softcap=2.0)), Causal(), None),
}


@pytest.mark.parametrize("name", LONG_CASES)
def test_masks_asked_tile_by_tile_change_nothing(name, monkeypatch):
    spec, mask, lengths = LONG_CASES[name]
    body, x = wild(spec.build(C)), tokens(2, LONG, C)
    given = {
        "segments": torch.randint(3, (2, LONG), generator=seeded()).sort(1).values,
        "prefix": torch.tensor([37, 3]),
        "edges": torch.rand(2, LONG, LONG, generator=seeded()) < 0.3,
    }
    lengths = None if lengths is None else torch.tensor(lengths)
    valid = torch.arange(LONG) < (torch.tensor([LONG, LONG]) if lengths is None else lengths)[:, None]
    original, tiled = ops.tiled, []

    def watched(*tensors, **options):
        tiled.append(callable(options["mask"]))
        return original(*tensors, tile=16, **options)

    monkeypatch.setattr(ops, "tiled", watched)

    def learned() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = run(body, leaf, mask, lengths, given=given)[valid]
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=seeded(2))
        return [out.detach(), *torch.autograd.grad(out, [leaf, *body.parameters()], cotangent)]

    short = learned()
    assert not any(tiled)
    monkeypatch.setattr("qkv.parts.mixers.attention.LONG", 1)
    for found, expected in zip(learned(), short, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert any(tiled) == (name != "a softcap")  # causal alone needs no mask
    tap = Tap("f.weights")
    torch.testing.assert_close(run(body, x, mask, lengths, tap, given)[valid], short[0], rtol=1e-9, atol=1e-9)
    assert tap["f.weights"].shape == (2, spec.heads, LONG, LONG)
