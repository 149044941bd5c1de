"""Choosing from a row: blocks against the definitions, and those against fp64."""

import math

import pytest
import torch
from torch import Tensor

from qkv.native.library import Engine
from qkv.ops.sample import Scores, naive
from qkv.ops.sample.scores import MAX, SUM, InTorch, Kernels

SIZES = [1, 2, 63, 64, 65, 511, 512, 513, 5000, 9000, 33001]
BELOW = 1 - 2**-24
draws = pytest.mark.parametrize("draw", [naive.draw, lambda w, u: Scores(w.log()).draw(u)])
sizes = pytest.mark.parametrize("V", SIZES)


@pytest.fixture(params=["torch", "1 thread", "2 threads"])
def kernels(request) -> Kernels:
    """What looks at whole rows."""
    return InTorch() if request.param == "torch" else Engine(int(request.param[0]))


def rows(V: int, B: int = 3) -> Tensor:
    """Scores, flat in the first row and ever more peaked in the next ones."""
    generator = torch.Generator().manual_seed(V)
    return torch.randn(B, V, generator=generator) * 4.0 ** torch.arange(-1, B - 1)[:, None]


@sizes
@pytest.mark.parametrize("T", [0.3, 1.0])
def test_kernels_look_at_each_block(kernels, V, T):
    x = rows(V)
    if V > 1:
        x[0, V // 3] = x[1, : V // 2] = -math.inf
    m, wide = x.amax(-1, keepdim=True), torch.nn.functional.pad(x, (0, -V % SUM), value=-math.inf)
    assert torch.equal(kernels.maxima(x), wide.unflatten(1, (-1, MAX)).amax(-1)[:, : -(-V // MAX)])
    expected = ((wide.double() - m) / T).exp().unflatten(1, (-1, SUM)).sum(-1)
    torch.testing.assert_close(kernels.sums(x, m, T).double(), expected, rtol=1e-5, atol=1e-30)


@sizes
def test_argmax_is_the_first_of_the_largest(kernels, V):
    x = rows(V)
    x[1] = x[1].round()  # many are equal
    expected = [row.index(max(row)) for row in x.tolist()]
    assert naive.argmax(x).tolist() == expected and Scores(x, kernels).argmax().tolist() == expected


@sizes
@pytest.mark.parametrize("k", [1, 2, 7, 64, 700])
def test_the_largest_are_those_of_a_sort(kernels, V, k):
    x = rows(V)
    k = min(k, V)
    values, ids = Scores(x, kernels).largest(k)
    assert torch.equal(values, x.sort(-1, descending=True).values[:, :k])
    assert torch.equal(x.gather(1, ids), values) and all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("k", [1, 20, 64])
def test_of_equal_ones_so_many_are_largest(kernels, k):
    x = torch.zeros(2, 9001)
    x[1, ::5] = 1.0
    x[1, -1] = 2.0
    values, ids = Scores(x, kernels).largest(k)
    assert torch.equal(values, x.sort(-1, descending=True).values[:, :k])
    assert torch.equal(x.gather(1, ids), values) and all(len(set(row)) == k for row in ids.tolist())


def test_what_is_forbidden_is_largest_last(kernels):
    x = torch.full((1, 9001), -math.inf)
    x[0, [3, 9000, 4500]] = torch.tensor([1.0, 2.0, 3.0])
    values, ids = Scores(x, kernels).largest(5)
    assert ids[0, :3].tolist() == [4500, 9000, 3] and values[0, 3:].tolist() == [-math.inf] * 2
    assert ids.max() < 9001


@sizes
@pytest.mark.parametrize("T", [0.3, 1.0, 2.5])
def test_weights_and_their_mass(kernels, V, T):
    x = rows(V)
    x[0, V // 2] = -math.inf
    if V == 1:
        x = x[1:]
    m = x.amax(-1, keepdim=True)
    expected = ((x.double() - m) / T).exp()
    w = naive.weights(x, m, T)
    torch.testing.assert_close(w.double(), expected, rtol=1e-5, atol=1e-30)
    for mass in (naive.mass(w), Scores(x, kernels).mass(T)):
        torch.testing.assert_close(mass.double(), expected.sum(-1, keepdim=True), rtol=1e-6, atol=0)


@sizes
def test_log_p_is_that_of_fp64(kernels, V):
    x = rows(V, 20 if V > 5000 else 3).clamp(min=-60)
    ids = torch.randint(V, (len(x),), generator=torch.Generator().manual_seed(V))
    x[0, ids[0] - 1] = x[1, ids[1]] = -math.inf
    if V == 1:
        x, ids = x[2:], ids[2:]
    scores, ids = Scores(x, kernels), ids[:, None]
    expected = x.double().log_softmax(-1)
    torch.testing.assert_close(scores.log_p().double(), expected, rtol=1e-6, atol=1e-6)
    for found in (naive.log_p(x, ids[:, 0])[:, None], scores.log_p_of(ids)):
        torch.testing.assert_close(found.double(), expected.gather(1, ids), rtol=1e-6, atol=1e-6)
    expected = (x.double() / 0.7).log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(scores.log_p_of(ids, T=0.7).double(), expected, rtol=1e-6, atol=1e-6)


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
def test_a_draw_at_a_temperature_is_one_from_its_weights(kernels, V):
    x, u = rows(V, 4), torch.tensor([0.0, 0.2, 0.6, BELOW])
    for T in (0.5, 1.0, 3.0):
        w = naive.weights(x, x.amax(-1, keepdim=True), T).double()
        reached, drawn = (w.cumsum(-1) / w.sum(-1, keepdim=True)), Scores(x, kernels).draw(u, T)[:, None]
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


def test_where_all_is_forbidden_some_place_is_largest(kernels):
    strange = torch.full((1, 700), math.nan)
    strange[0, 650] = 1.0
    assert set(Scores(strange, kernels).largest(3)[1][0].tolist()) <= set(range(700))
    scores = Scores(torch.full((1, 700), -math.inf), kernels)
    assert 0 <= int(scores.argmax()) < 700 and 0 <= int(scores.draw(torch.tensor([0.5]))) < 700


def test_parts_know_what_all_know(kernels):
    x, asked = rows(5000, 6), []
    scores = Scores(x, kernels)
    sums = scores.sums(0.7)
    parts = scores.split([1, 3, 2])
    for part in parts:
        part.kernels = Asked(asked)
    assert torch.equal(torch.cat([part.x for part in parts]), x)
    assert torch.equal(torch.cat([part.sums(0.7) for part in parts]), sums)
    assert torch.equal(torch.cat([part.argmax() for part in parts]), x.argmax(-1)) and not asked
    assert parts[0].changed(parts[0].x) is parts[0]
    parts[1].sums(1.0)
    assert asked == [(3, 1.0)]


class Asked(InTorch):
    """Kernels that write down what they are asked for."""

    def __init__(self, asked: list) -> None:
        self.asked = asked

    def maxima(self, x: Tensor) -> Tensor:
        raise AssertionError

    def sums(self, x: Tensor, m: Tensor, T: float) -> Tensor:
        self.asked.append((len(x), T))
        return super().sums(x, m, T)


@pytest.mark.parametrize("V", [65, 5001, 70001])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_to_the_bit_beside_others(kernels, V, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, u = rows(V, 5) / 30, torch.rand(5)

        def found(x: Tensor, u: Tensor) -> list[Tensor]:
            w, scores = naive.weights(x, x.amax(-1, keepdim=True), 0.7), Scores(x, kernels)
            choices = [naive.argmax(x), scores.argmax(), naive.draw(w, u), scores.draw(u), scores.draw(u, 0.7)]
            log_p = [naive.log_p(x, choices[0]), scores.log_p(), scores.log_p_of(choices[-1][:, None], 0.7)]
            return [*choices, *log_p, *naive.largest(x, 9), *scores.largest(9), naive.mass(w), scores.sums(0.7)]

        together = found(x, u)
        for n in range(5):
            one = slice(n, n + 1)
            for alone, beside in zip(found(x[one].clone(), u[one]), together, strict=True):
                assert torch.equal(alone, beside[one])
    finally:
        torch.set_num_threads(before)
