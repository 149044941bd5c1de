"""Feed-forward networks against convolutions over time and the formulas of their activations."""

import math

import pytest
import torch
from torch.nn import functional as F

from qkv.errors import QkvError
from qkv.parts import FeedForward, Gated
from qkv.parts.activation import ACTIVATIONS
from tests.parts.helpers import seeded, wild

C, HIDDEN = 5, 7
FORMULAS = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu-tanh": lambda x: x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu": lambda x: x / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
}


def x() -> torch.Tensor:
    return torch.randn(2, 4, C, dtype=torch.float64, generator=seeded()) * 2


def test_every_activation_has_its_formula_here():
    assert FORMULAS.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("act", FORMULAS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_feedforward_is_two_convolutions_of_width_1(act, bias):
    f = wild(FeedForward(HIDDEN, act=act, bias=bias).build(C))
    hidden = FORMULAS[act](F.conv1d(x().mT, f.up.weight[:, :, None], f.up.bias))
    expected = F.conv1d(hidden, f.down.weight[:, :, None], f.down.bias).mT
    torch.testing.assert_close(f(x()), expected, rtol=1e-11, atol=1e-11)
    assert sum(p.numel() for p in f.parameters()) == 2 * C * HIDDEN + bias * (HIDDEN + C)


@pytest.mark.parametrize("act", FORMULAS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_gate_multiplies(act, bias):
    f = wild(Gated(HIDDEN, act=act, bias=bias).build(C))
    gate, up, down = ((p.weight, p.bias if bias else 0.0) for p in (f.gate, f.up, f.down))
    hidden = FORMULAS[act](x() @ gate[0].T + gate[1]) * (x() @ up[0].T + up[1])
    torch.testing.assert_close(f(x()), hidden @ down[0].T + down[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("part", [FeedForward, Gated])
def test_an_unknown_activation_is_guessed(part):
    with pytest.raises(QkvError, match="unknown activation 'rellu'; did you mean 'relu'"):
        part(8, act="rellu")
