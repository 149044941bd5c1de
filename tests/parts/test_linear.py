"""The one linear layer: its two seams."""

import torch
from torch import nn

from qkv.parts import Linear
from tests.parts.helpers import seeded, wild


def test_it_is_a_matrix_and_adapters_add_to_it():
    layer = wild(Linear(3, 4, bias=True))
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=seeded())
    plain = torch.stack([layer.weight @ token + layer.bias for token in x.flatten(0, 1)]).view(2, 5, 4)
    torch.testing.assert_close(layer(x), plain)
    layer.adapters["one"], layer.adapters["two"] = wild(Linear(3, 4)), wild(nn.Linear(3, 4, bias=False), std=1.0)
    one, two = layer.adapters["one"].weight, layer.adapters["two"].weight
    torch.testing.assert_close(layer(x), plain + x @ one.T + x @ two.T)
    del layer.adapters["one"], layer.adapters["two"]
    torch.testing.assert_close(layer(x), plain)


def test_the_state_dict_holds_weight_and_bias_only():
    assert {name: tuple(t.shape) for name, t in Linear(3, 4, bias=True).state_dict().items()} == {
        "weight": (4, 3),
        "bias": (4,),
    }
    assert list(Linear(3, 4, axes=("vocab", "embed")).state_dict()) == ["weight"]


def test_fresh_weights_are_xaviers_and_fresh_biases_zero():
    torch.manual_seed(0)
    layer = Linear(300, 100, bias=True)
    bound = (6 / 400) ** 0.5
    assert layer.weight.abs().max() <= bound
    assert abs(layer.weight.std().item() / (bound / 3**0.5) - 1) < 0.02
    assert not layer.bias.any()
