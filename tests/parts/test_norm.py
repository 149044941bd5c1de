"""Norms against their formulas; a norm over the batch sees no padding."""

import pytest
import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.parts import BatchNorm, DyT, LayerNorm, RMSNorm
from tests.parts.helpers import seeded, wild

C = 6


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def variance(x: Tensor) -> Tensor:
    return mean(x**2) - mean(x) ** 2


FORMULAS = {
    "layernorm": (LayerNorm(), lambda m, x: m.weight * (x - mean(x)) / (variance(x) + 1e-5) ** 0.5 + m.bias),
    "layernorm, ε": (LayerNorm(eps=0.5), lambda m, x: m.weight * (x - mean(x)) / (variance(x) + 0.5) ** 0.5 + m.bias),
    "layernorm, no bias": (LayerNorm(bias=False), lambda m, x: m.weight * (x - mean(x)) / (variance(x) + 1e-5) ** 0.5),
    "rmsnorm": (RMSNorm(), lambda m, x: m.weight * x / (mean(x**2) + 1e-6) ** 0.5),
    "rmsnorm, ε": (RMSNorm(eps=0.5), lambda m, x: m.weight * x / (mean(x**2) + 0.5) ** 0.5),
    "rmsnorm, 1 + w": (RMSNorm(offset=1.0), lambda m, x: (1 + m.weight) * x / (mean(x**2) + 1e-6) ** 0.5),
    "dyt": (DyT(), lambda m, x: m.weight * torch.tanh(m.alpha * x) + m.bias),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(3, 5, C), (2, 4, 3, C), (1, C)], ids=str)
def test_a_norm_is_its_formula(name, shape):
    spec, formula = FORMULAS[name]
    module = wild(spec.build(C))
    x = torch.randn(shape, dtype=torch.float64, generator=seeded())
    torch.testing.assert_close(module(x), formula(module, x), rtol=1e-11, atol=1e-11)


def test_what_an_offset_adds_to_keeps_its_digits_in_bf16():
    norm = wild(RMSNorm(offset=1.0).build(512)).bfloat16()
    x = torch.randn(4, 512, generator=seeded()).bfloat16()
    wide = (1 + norm.weight.double()) * x.double() / (mean(x.double() ** 2) + 1e-6) ** 0.5
    assert torch.equal(norm(x), wide.float().bfloat16())


def test_fresh_norms_start_as_they_say():
    assert DyT(alpha=0.7).build(C).alpha.item() == pytest.approx(0.7)
    x = torch.randn(4, 100, dtype=torch.float64, generator=seeded()) * 3 + 2
    out = LayerNorm().build(100).double()(x)
    assert out.mean(-1).abs().max() < 1e-9 and (out.std(-1, correction=0) - 1).abs().max() < 1e-5


# --- over the batch ---


def twins(**options) -> tuple[nn.Module, nn.Module]:
    """Our norm and torch's with the same weights."""
    ours, torchs = wild(BatchNorm(**options).build(C)), nn.BatchNorm1d(C, **options).double()
    torchs.load_state_dict(ours.state_dict())
    return ours, torchs


def ragged(lengths: list[int] | None) -> tuple[Tensor, Context]:
    x = torch.randn(3, 5, C, dtype=torch.float64, generator=seeded()) * 2 + 1
    known = None if lengths is None else torch.tensor(lengths)
    return x, Context(torch.arange(5)[None], lengths=known)


@pytest.mark.parametrize("lengths", [[5, 2, 3], [1, 5, 0], None], ids=str)
@pytest.mark.parametrize("options", [{}, {"eps": 0.3, "momentum": 0.5}], ids=str)
def test_batch_norm_is_torchs_on_the_real_tokens(lengths, options):
    ours, torchs = twins(**options)
    x, context = ragged(lengths)
    valid = torch.ones(3, 5, dtype=torch.bool) if lengths is None else context.valid()
    for _ in range(2):  # running means move twice
        torch.testing.assert_close(ours(x, context)[valid], torchs(x[valid]), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    ours.eval(), torchs.eval()
    torch.testing.assert_close(ours(x, context)[valid], torchs(x[valid]), rtol=1e-11, atol=1e-11)


def test_evaluation_takes_the_running_means():
    ours, _ = twins()
    ours.eval()
    x, context = ragged([5, 2, 3])
    expected = ours.weight * (x - ours.running_mean) / (ours.running_var + 1e-5) ** 0.5 + ours.bias
    torch.testing.assert_close(ours(x, context), expected, rtol=1e-11, atol=1e-11)


def test_what_stands_in_padding_reaches_no_statistic_and_no_gradient():
    ours, _ = twins()
    x, context = ragged([5, 2, 3])
    valid = context.valid()
    before = ours(x.requires_grad_(), context)
    assert not before[~valid].any()
    before.square().sum().backward()
    assert not x.grad[~valid].any() and x.grad[valid].all()
    other = torch.where(valid[..., None], x.detach(), 1e6)
    assert torch.equal(ours(other, context)[valid], before[valid])
