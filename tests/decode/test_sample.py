"""Sampling from large vocabularies against the definition in fp64: all tokens sorted, cut, and one drawn."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from qkv.decode import Sample
from qkv.decode.sample import FEW
from qkv.ops.sample import Scores

CUTS = [
    dict(zip(("temperature", "top_k", "top_p", "min_p"), options, strict=True))
    for options in itertools.product([0.6, 1.7], [None, 5, 200], [None, 0.3, 0.9, 0.999, 1.0], [None, 0.05])
]
SIZES = [5, 100, 4161, 33001]


def rows(V: int) -> Tensor:
    """Scores of rows in which few tokens make the mass, some, and nearly all."""
    return torch.randn(4, V, generator=torch.Generator().manual_seed(V)) * torch.tensor([5.0, 3.0, 1.5, 0.1])[:, None]


def definition(sample: Sample, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row: the ids that remain, likeliest first, their probabilities, and how far each is from being cut."""
    z, ids = z.double().sort(descending=True)
    k = min(sample.top_k or len(z), len(z))
    p, ids = (z[:k] / sample.temperature).softmax(-1), ids[:k]
    inside = torch.full_like(p, math.inf)
    if sample.top_p is not None and sample.top_p < 1:
        inside = inside.minimum(sample.top_p - (p.cumsum(-1) - p))
    if sample.min_p is not None:
        inside = inside.minimum(p - sample.min_p * p[0])
    return ids, p, inside


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_what_is_kept_is_the_definitions(options, V):
    sample, scores = Sample(**options), rows(V)
    found, places = sample.kept(Scores(scores))
    for row in range(len(scores)):
        ids, p, inside = definition(sample, scores[row])
        kept = torch.zeros(V).scatter_add(0, places[row], found[row])[ids]
        assert int((found[row] > 0).sum()) == int((kept > 0).sum())  # no other ones
        certain = (inside.abs() > 2e-6) & (p > 1e-30)
        assert torch.equal((kept > 0)[certain], (inside > 0)[certain])
        expected = p.where(kept > 0, 0.0)
        torch.testing.assert_close(kept.double() / kept.double().sum(), expected / expected.sum(), rtol=1e-5, atol=1e-6)
        assert (found[row].diff() <= 0).all()


@pytest.mark.parametrize("V", SIZES)
@pytest.mark.parametrize("options", CUTS, ids=str)
def test_the_token_drawn_is_the_one_that_the_random_number_says(options, V):
    """With no cut it runs over the tokens by id, else from the likeliest on."""
    sample, scores = Sample(**options), rows(V)
    choose = sample.chooser(range(4))
    generators = [torch.Generator().manual_seed(sample.mixed(row)) for row in range(4)]
    plain = options["top_k"] is None and options["min_p"] is None and options["top_p"] in (None, 1.0)
    for _ in range(3):
        for row, token in enumerate(choose(Scores(scores), torch.arange(4)).tolist()):
            u = float(torch.rand(1, generator=generators[row]))
            ids, p, inside = definition(sample, scores[row])
            p = p.where(inside > 0, 0.0)
            p = p / p.sum()
            if plain:
                p, ids = torch.zeros_like(p).scatter(0, ids, p), torch.arange(V)
            at = int((ids == token).nonzero())
            reached = float(p[: at + 1].sum())
            assert reached - float(p[at]) - 3e-5 <= u <= reached + 3e-5


@pytest.mark.parametrize("V", [4161, 33001])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_p": 0.9, "min_p": 0.05}],
    ids=str,
)
def test_rows_together_are_rows_alone_to_the_bit(options, V):
    sample, scores = Sample(**options), rows(V)
    scores = torch.cat((scores, scores.bfloat16().float()))  # many are equal
    together, alone = sample.chooser(range(8)), sample.chooser(range(8))
    for _ in range(2):
        drawn = together(Scores(scores), torch.arange(8)).tolist()
        assert drawn == [int(alone(Scores(scores[row : row + 1].clone()), torch.tensor([row]))) for row in range(8)]
    p, ids = sample.kept(Scores(scores))
    for row in range(8):
        one, their = (x[0] for x in sample.kept(Scores(scores[row : row + 1].clone())))
        assert torch.equal(p[row, : len(one)], one) and not p[row, len(one) :].any()
        assert torch.equal(ids[row, : len(one)][one > 0], their[one > 0])


@pytest.mark.parametrize(
    "options",
    [{"temperature": 1.3}, {"top_k": 300}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_p": 0.95, "min_p": 0.01}],
    ids=str,
)
def test_frequencies_are_probabilities_over_a_large_vocabulary(options):
    """χ² over 40 groups of tokens, of about equal probability, in an order that has nothing to do with the draw's."""
    V, N = 5000, 4000
    scores = torch.randn(1, V, generator=torch.Generator().manual_seed(1)) * 1.5
    sample = Sample(**options)
    ids, p, inside = definition(sample, scores[0])
    share = torch.zeros(V, dtype=torch.float64).scatter(0, ids, p.where(inside > 0, 0.0))
    share /= share.sum()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    group = torch.zeros(V, dtype=torch.long).scatter(0, order, (share[order].cumsum(0) * 39.999).long())
    choose = sample.chooser(range(N // 100))
    drawn = torch.cat([choose(Scores(scores.expand(N // 100, -1)), torch.arange(N // 100)) for _ in range(100)])
    assert (share[drawn] > 0).all()
    counts = group[drawn].bincount(minlength=40)
    expected = torch.zeros(40, dtype=torch.float64).scatter_add(0, group, share) * N
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi, freedom = float(((counts - expected) ** 2 / expected).sum()), len(expected) - 1
    assert freedom > 10 and abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_cut_may_lie_anywhere():
    """m tokens alike: top_p keeps so many that together they reach it, however many are looked at first."""
    for m in (1, FEW - 1, FEW, FEW + 1, 8 * FEW, 8 * FEW + 1, 9000):
        scores = torch.full((1, 9001), -math.inf)
        scores[0, torch.randperm(9001, generator=torch.Generator().manual_seed(m))[:m]] = 2.0
        for p in (0.25, 0.5, 0.9):
            kept, ids = Sample(top_p=p).kept(Scores(scores))
            count = int((kept > 0).sum())
            assert abs(count - math.ceil(p * m)) <= 1 and (scores[0, ids[0, :count]] == 2.0).all()
        assert int((Sample(min_p=0.5).kept(Scores(scores))[0] > 0).sum()) == m


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}], ids=str)
def test_what_is_forbidden_is_never_drawn(options):
    """And where all is forbidden, some token comes back."""
    V = 9001
    scores = torch.full((3, V), -math.inf)
    scores[0, V - 1], scores[1, 7] = -300.0, 1e4
    choose = Sample(**options).chooser(range(3))
    for _ in range(20):
        last, seventh, some = choose(Scores(scores), torch.arange(3)).tolist()
        assert (last, seventh) == (V - 1, 7) and 0 <= some < V
