"""Dropout with one draw for four elements: as likely, as independent and as repeatable as one draw for each."""

import pytest
import torch

from qkv.ops.dropout import dropout

N = 2**20
RATES = [2**-16, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("p", RATES)
def test_p_is_exact_to_16_bits(p, monkeypatch):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *args: self.copy_(every))
    out = dropout(torch.ones(65536, dtype=torch.float64), p)
    assert int((out == 0).sum()) == round(p * 65536)
    assert abs(float(out.mean()) - 1) < 1e-12


@pytest.mark.parametrize("p", RATES[1:-1])
def test_the_share_and_the_mean_in_each_of_the_four_lanes(p):
    out = dropout(torch.ones(N), p).view(-1, 4)
    sigma = (p * (1 - p) / (N / 4)) ** 0.5
    assert ((out == 0).float().mean(0) - p).abs().max() < 5 * sigma
    assert (out.double().mean(0) - 1).abs().max() < 5 * sigma / (1 - p)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_are_independent(p):
    out = (dropout(torch.ones(N), p) == 0).double() - p
    for lag in range(1, 9):
        correlation = float((out[lag:] * out[:-lag]).mean()) / (p * (1 - p))
        assert abs(correlation) < 5 / N**0.5, lag


def test_the_gradient_is_the_mask():
    x = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    out, cotangent = dropout(x, 0.3), torch.randn(7, 11, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, x, cotangent)
    torch.testing.assert_close(gradient, cotangent * (out / x).detach())
    assert 0 < int((gradient == 0).sum()) < 77


def test_a_seed_repeats_it():
    x, draws = torch.ones(1001), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(dropout(x, 0.5))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert not torch.equal(dropout(x, 0.5), dropout(x, 0.5))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (5, 7), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_any_shape_and_type(shape, dtype):
    x = torch.randn(shape).to(dtype) + 3
    out = dropout(x, 0.5)
    assert out.shape == x.shape and out.dtype == dtype
    assert ((out == 0) | (out == 2 * x)).all()


def test_what_is_transposed_keeps_its_places():
    x = torch.arange(1.0, 36.0).view(5, 7).mT
    out = dropout(x, 0.5)
    assert ((out == 0) | (out == 2 * x)).all()


def test_nothing_is_dropped_at_0_and_nearly_all_just_below_1():
    x = torch.randn(1001)
    assert torch.equal(dropout(x, 0.0), x)
    assert int((dropout(x, 1 - 1e-7) != 0).sum()) < 10
