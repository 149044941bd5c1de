"""Masks against a matrix filled in by hand."""

import itertools

import pytest
import torch

from qkv.context import Context, take
from qkv.errors import QkvError
from qkv.masks import All, Any, Causal, Edges, Full, Global, Marked, Mask, Prefix, Reach, Same, Window

T = 7
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1]])
PREFIX = torch.tensor([3, 1])
EDGES = torch.rand(2, T, T, generator=torch.Generator().manual_seed(0)) < 0.4
MARKED = torch.tensor([[1, 0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0]]).bool()

RULES = {
    "full": (Full(), lambda b, q, k: True),
    "causal": (Causal(), lambda b, q, k: k <= q),
    "window": (Window(3), lambda b, q, k: abs(q - k) < 3),
    "prefix": (Prefix(), lambda b, q, k: k < PREFIX[b]),
    "same": (Same(), lambda b, q, k: SEGMENTS[b, q] == SEGMENTS[b, k]),
    "edges": (Edges(), lambda b, q, k: EDGES[b, q, k]),
    "global": (Global(2), lambda b, q, k: q < 2 or k < 2),
    "marked": (Marked(), lambda b, q, k: MARKED[b, q] or MARKED[b, k]),
}


def context(order=None) -> Context:
    given = {"segments": SEGMENTS, "prefix": PREFIX, "edges": EDGES, "marks": MARKED}
    return Context(torch.arange(T)[None], given=given, order=order)


def allowed(mask: Mask, at: Context) -> torch.Tensor:
    found = mask.allow(at.positions[:, :, None], at.positions[:, None, :], at)
    return (torch.ones(1, 1, 1, dtype=torch.bool) if found is None else found).expand(2, T, T)


def by_hand(rule) -> torch.Tensor:
    cells = itertools.product(range(2), range(T), range(T))
    return torch.tensor([bool(rule(*cell)) for cell in cells]).view(2, T, T)


@pytest.mark.parametrize("a", RULES)
def test_each_mask_is_its_rule(a):
    mask, rule = RULES[a]
    assert torch.equal(allowed(mask, context()), by_hand(rule))


@pytest.mark.parametrize(("a", "b"), list(itertools.product(RULES, RULES)))
def test_masks_combine_as_booleans_do(a, b):
    (x, f), (y, g) = RULES[a], RULES[b]
    assert torch.equal(allowed(x & y, context()), by_hand(lambda *at: f(*at) and g(*at)))
    assert torch.equal(allowed(x | y, context()), by_hand(lambda *at: f(*at) or g(*at)))
    if (x & y).causal:
        assert not allowed(x & y, context()).triu(1).any()


def test_full_drops_out():
    assert (Full() & Causal()) == Causal() == (Causal() & Full())
    assert (Full() | Causal()) == Full()


def test_what_runs_over_tokens_follows_the_packed_rows():
    order = torch.tensor([[2, 3, 4, 5, 6, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    for name in ("same", "edges", "marked"):
        mask, rule = RULES[name]
        want = take(take(by_hand(rule), order, 1), order, 2)
        assert torch.equal(allowed(mask, context(order)), want)


def test_what_a_cache_can_serve():
    assert all(mask.incremental for mask in (Causal(), Prefix(), Causal() & Window(2), Causal() | Prefix()))
    assert not any(mask.incremental for mask in (Full(), Window(2), Same(), Edges(), Global(2), Causal() | Window(2)))
    with pytest.raises(QkvError, match="packed documents cannot be decoded"):
        (Causal() & Same()).refuse(context(), T)
    with pytest.raises(QkvError, match=r"marked tokens, .* cannot be decoded with a cache: use Global\(n\)"):
        (Causal() & (Window(3) | Marked())).refuse(context(), T)


def test_a_missing_tensor_is_named():
    with pytest.raises(QkvError, match="needs the tensor 'segments': pass segments=…"):
        allowed(Same(), Context(torch.arange(T)[None]))


def test_a_window_sees_something():
    with pytest.raises(QkvError, match="a window of 0 sees nothing"):
        All((Window(0), Causal()))


REACH = {
    "nothing bounds it": (Causal() & (Prefix() | Same()), None),
    "one side of an or does not": (Window(3) | Causal(), None),
    "a window": (Causal() & Window(3), Reach(0, 2)),
    "the narrower of two": (Window(3) & (Causal() & Window(5)), Reach(0, 2)),
    "the wider of two": (Window(3) | Window(5), Reach(0, 4)),
    "sinks": (Causal() & (Window(3) | Global(2)), Reach(2, 2)),
    "sinks within a window": ((Window(3) | Global(2)) & Window(5), Reach(2, 2)),
    "first tokens alone": (Causal() & Global(3), Reach(3, 0)),
}


@pytest.mark.parametrize("name", REACH)
def test_nothing_behind_is_seen_that_is_out_of_reach(name):
    mask, reach = REACH[name]
    assert mask.reach == reach
    if reach is not None:
        seen = allowed(mask & Causal(), context())
        assert not any(k >= reach.first and q - k > reach.behind for _, q, k in seen.nonzero().tolist())


def test_longformer_and_attention_sinks():
    assert allowed(Window(2) | Global(1), context())[0].int().tolist() == [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 0],
        [1, 0, 0, 1, 1, 1, 0],
        [1, 0, 0, 0, 1, 1, 1],
        [1, 0, 0, 0, 0, 1, 1],
    ]
    sinks = allowed(Causal() & (Window(2) | Global(1)), context())
    assert torch.equal(sinks, by_hand(lambda b, q, k: k <= q and (q - k < 2 or k == 0)))
    with pytest.raises(QkvError, match="0 global tokens are none"):
        Global(0)


def test_what_sees_all_sees_all_in_a_union_too():
    every = Any((All((Full(), Full())), Causal()))
    assert every.allow(torch.arange(T)[None, :, None], torch.arange(T)[None, None], context()) is None
    assert not every.causal and Causal() & Causal() == Causal()
    with pytest.raises(QkvError, match="give at least one"):
        Any(())
