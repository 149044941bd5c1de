"""Masks against a matrix filled in by hand."""

import itertools

import pytest
import torch

from qkv.context import Context, take
from qkv.errors import QkvError
from qkv.masks import All, Causal, Edges, Full, Mask, Prefix, Same, Window

T = 7
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1]])
PREFIX = torch.tensor([3, 1])
EDGES = torch.rand(2, T, T, generator=torch.Generator().manual_seed(0)) < 0.4

RULES = {
    "full": (Full(), lambda b, q, k: True),
    "causal": (Causal(), lambda b, q, k: k <= q),
    "window": (Window(3), lambda b, q, k: abs(q - k) < 3),
    "prefix": (Prefix(), lambda b, q, k: k < PREFIX[b]),
    "same": (Same(), lambda b, q, k: SEGMENTS[b, q] == SEGMENTS[b, k]),
    "edges": (Edges(), lambda b, q, k: EDGES[b, q, k]),
}


def context(order=None) -> Context:
    given = {"segments": SEGMENTS, "prefix": PREFIX, "edges": EDGES}
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
    for name in ("same", "edges"):
        mask, rule = RULES[name]
        want = take(take(by_hand(rule), order, 1), order, 2)
        assert torch.equal(allowed(mask, context(order)), want)


def test_what_a_cache_can_serve():
    assert all(mask.incremental for mask in (Causal(), Prefix(), Causal() & Window(2), Causal() | Prefix()))
    assert not any(mask.incremental for mask in (Full(), Window(2), Same(), Edges(), Causal() | Window(2)))
    with pytest.raises(QkvError, match="packed documents cannot be decoded"):
        (Causal() & Same()).refuse(context(), T)


def test_a_missing_tensor_is_named():
    with pytest.raises(QkvError, match="needs the tensor 'segments': pass segments=…"):
        allowed(Same(), Context(torch.arange(T)[None]))


def test_a_window_sees_something():
    with pytest.raises(QkvError, match="a window of 0 sees nothing"):
        All((Window(0), Causal()))
