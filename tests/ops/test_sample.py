"""Choosing from a row: blocks against the definitions, and those against fp64."""

import math

import pytest
import torch
from torch import Tensor

from qkv.ops.sample import blocked, naive
from qkv.ops.sample.blocked import Weights

SIZES = [1, 2, 63, 64, 65, 511, 512, 513, 5000, 9000, 33001]
BELOW = 1 - 2**-24
forms = pytest.mark.parametrize("form", [naive, blocked])
draws = pytest.mark.parametrize("draw", [naive.draw, blocked.draw, lambda w, u: Weights(w.log(), 1.0).draw(u)])
sizes = pytest.mark.parametrize("V", SIZES)


def rows(V: int, B: int = 3) -> Tensor:
    """Scores, flat in the first row and ever more peaked in the next ones."""
    generator = torch.Generator().manual_seed(V)
    return torch.randn(B, V, generator=generator) * 4.0 ** torch.arange(-1, B - 1)[:, None]


@forms
@sizes
def test_argmax_is_the_first_of_the_largest(form, V):
    x = rows(V)
    x[1] = x[1].round()  # many are equal
    assert form.argmax(x).tolist() == [row.index(max(row)) for row in x.tolist()]


@sizes
@pytest.mark.parametrize("k", [1, 2, 7, 64, 700])
def test_the_largest_are_those_of_a_sort(V, k):
    x = rows(V)
    k = min(k, V)
    values, ids = blocked.largest(x, k)
    assert torch.equal(values, x.sort(-1, descending=True).values[:, :k])
    assert torch.equal(x.gather(1, ids), values) and all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("k", [1, 20, 64])
def test_of_equal_ones_so_many_are_largest(k):
    x = torch.zeros(2, 9001)
    x[1, ::5] = 1.0
    x[1, -1] = 2.0
    values, ids = blocked.largest(x, k)
    assert torch.equal(values, x.sort(-1, descending=True).values[:, :k])
    assert torch.equal(x.gather(1, ids), values) and all(len(set(row)) == k for row in ids.tolist())


def test_what_is_forbidden_is_largest_last():
    x = torch.full((1, 9001), -math.inf)
    x[0, [3, 9000, 4500]] = torch.tensor([1.0, 2.0, 3.0])
    values, ids = blocked.largest(x, 5)
    assert ids[0, :3].tolist() == [4500, 9000, 3] and values[0, 3:].tolist() == [-math.inf] * 2
    assert ids.max() < 9001


@sizes
@pytest.mark.parametrize("T", [0.3, 1.0, 2.5])
def test_weights_and_their_mass(V, T):
    x = rows(V)
    x[0, V // 2] = -math.inf
    if V == 1:
        x = x[1:]
    m = x.amax(-1, keepdim=True)
    expected = ((x.double() - m) / T).exp()
    w = naive.weights(x, m, T)
    torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-30)
    for mass in (naive.mass(w), Weights(x, T).mass):
        torch.testing.assert_close(mass.double(), expected.sum(-1, keepdim=True), rtol=1e-6, atol=0)


@sizes
def test_log_p_is_that_of_fp64(V):
    x = rows(V, 20 if V > 5000 else 3).clamp(min=-60)
    ids = torch.randint(V, (len(x),), generator=torch.Generator().manual_seed(V))
    x[0, ids[0] - 1] = x[1, ids[1]] = -math.inf
    if V == 1:
        x, ids = x[2:], ids[2:]
    expected = x.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    for found in (naive.log_p(x, ids), blocked.log_p(x, ids), Weights(x, 1.0).log_p(ids)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@draws
@sizes
def test_a_draw_inverts_the_distribution(draw, V):
    """u runs over the middles of N equal parts: each place is drawn as often as its share says, up to one."""
    N = 2000
    u = (torch.arange(N) + 0.5) / N
    for x in rows(V):
        w = ((x - x.max()) / 2).exp()
        drawn = draw(w.expand(N, -1), u)
        assert torch.equal(drawn, drawn.sort().values)
        share = w.double() / w.double().sum()
        assert ((drawn.bincount(minlength=V) - N * share).abs() < 1.01).all()


@sizes
def test_a_draw_at_a_temperature_is_one_from_its_weights(V):
    x, u = rows(V, 4), torch.tensor([0.0, 0.2, 0.6, BELOW])
    for T in (0.5, 1.0, 3.0):
        w = naive.weights(x, x.amax(-1, keepdim=True), T).double()
        reached, drawn = (w.cumsum(-1) / w.sum(-1, keepdim=True)), Weights(x, T).draw(u)[:, None]
        after, share = reached.gather(1, drawn)[:, 0], (w / w.sum(-1, keepdim=True)).gather(1, drawn)[:, 0]
        assert ((after - share - 1e-5 <= u) & (u <= after + 1e-5)).all()


@draws
@sizes
def test_what_weighs_nothing_is_not_drawn(draw, V):
    generator = torch.Generator().manual_seed(V)
    w = torch.rand(50, V, generator=generator) * (torch.rand(50, V, generator=generator) < 3 / V)
    w[torch.arange(50), torch.randint(V, (50,), generator=generator)] = 0.1
    first, last = (w > 0).int().argmax(-1), V - 1 - (w > 0).flip(-1).int().argmax(-1)
    for u in (0.0, 0.3, 0.5, 0.9, BELOW):
        drawn = draw(w, torch.full((50,), u))
        assert (w[torch.arange(50), drawn] > 0).all()
        if u == 0.0:
            assert torch.equal(drawn, first)
        if u == BELOW:
            assert torch.equal(drawn, last)


@draws
def test_what_is_no_number_gives_some_place(draw):
    assert 0 <= int(draw(torch.full((1, 700), math.nan), torch.tensor([0.5]))) < 700


@forms
def test_where_all_is_forbidden_some_place_is_largest(form):
    assert 0 <= int(form.argmax(torch.full((1, 700), -math.inf))) < 700


@pytest.mark.parametrize("V", [65, 5001, 70001])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_to_the_bit_beside_others(V, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = rows(V, 5) / 30
        u = torch.rand(5)

        def found(x: Tensor, u: Tensor) -> list[Tensor]:
            m = x.amax(-1, keepdim=True)
            w, ours = naive.weights(x, m, 0.7), Weights(x, 0.7)
            alike = [one for form in (naive, blocked) for one in (form.argmax(x), *form.largest(x, 9), form.draw(w, u))]
            log_p = [*(form.log_p(x, alike[0]) for form in (naive, blocked)), ours.log_p(alike[0])]
            return [*alike, *log_p, naive.mass(w), ours.sums, ours.mass, ours.draw(u)]

        together = found(x, u)
        for n in range(5):
            one = slice(n, n + 1)
            for alone, beside in zip(found(x[one].clone(), u[one]), together, strict=True):
                assert torch.equal(alone, beside[one])
    finally:
        torch.set_num_threads(before)
