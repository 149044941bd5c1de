"""The loss of a linear layer: naive and fused against torch's own, values and every gradient."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qkv.ops.cross_entropy import fused, naive

V, C, BLOCK = 37, 12, 512


def problem(tokens: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> tuple[Tensor, ...]:
    """x, weight, bias and labels."""
    source = torch.Generator().manual_seed(tokens)
    x, weight, bias = (torch.randn(*shape, generator=source, dtype=dtype) for shape in ((tokens, C), (V, C), (V,)))
    return x * spread, weight, bias, torch.randint(V, (tokens,), generator=source)


def torchs(x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, smoothing: float) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), labels, label_smoothing=smoothing, reduction="sum")


def learned(form, x, weight, bias, labels, smoothing) -> list[Tensor]:
    """The loss and, for a cotangent that is not 1, the gradients of x, weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    loss = form(leaves[0], leaves[1], labels, leaves[2] if bias is not None else None, smoothing)
    return [loss.detach(), *torch.autograd.grad(loss * -0.7, leaves)]


@pytest.mark.parametrize("form", [naive, fused])
@pytest.mark.parametrize("tokens", [1, BLOCK - 1, BLOCK, BLOCK + 1, 1100])
@pytest.mark.parametrize(("smoothing", "biased"), list(itertools.product([0.0, 0.1], [True, False])))
def test_value_and_gradients_are_torchs(form, tokens, smoothing, biased):
    x, weight, bias, labels = problem(tokens)
    given = x, weight, bias if biased else None, labels, smoothing
    for found, expected in zip(learned(form, *given), learned(torchs, *given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", [naive, fused])
def test_scores_of_ten_thousands_stay_numbers(form):
    given = *problem(20, spread=1e4), 0.1
    for found, expected in zip(learned(form, *given), learned(torchs, *given), strict=True):
        assert found.isfinite().all()
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=3) if any(w)], ids=str)
def test_what_is_frozen_has_no_gradient_and_changes_no_other(wanted):
    x, weight, bias, labels = problem(BLOCK + 3)
    expected = learned(torchs, x, weight, bias, labels, 0.1)
    leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
    (fused(leaves[0], leaves[1], labels, leaves[2], 0.1) * -0.7).backward()
    for leaf, want, gradient in zip(leaves, wanted, expected[1:], strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-11, atol=1e-11)


def test_no_token_costs_nothing():
    x, weight, bias, labels = problem(0)
    loss, *gradients = learned(fused, x, weight, bias, labels, 0.1)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_autocast_stays_close_to_fp32(smoothing):
    given = *problem(BLOCK + 100, torch.float32), smoothing
    expected = learned(torchs, *given)
    with torch.autocast("cpu", torch.bfloat16):
        found = learned(fused, *given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() / other.norm() < 0.01


class Watch(TorchDispatchMode):
    """The largest result of any operation, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [tensor for tensor in (out if isinstance(out, tuple | list) else (out,)) if isinstance(tensor, Tensor)]
        self.largest = max([self.largest, *(tensor.numel() for tensor in made)])
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


@pytest.mark.parametrize(("form", "largest"), [(fused, BLOCK * V), (naive, 4 * BLOCK * V)])
def test_only_one_block_of_scores_stands_at_a_time(form, largest):
    x, weight, bias, labels = problem(4 * BLOCK)
    with Watch() as watch:
        learned(form, x[:, :4], weight[:, :4], bias, labels, 0.1)
    assert watch.largest == largest


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_one_product_a_block(mode):
    x, weight, bias, labels = problem(3 * BLOCK)
    weight.requires_grad_()
    with mode(), Watch() as watch:
        fused(x, weight, labels, bias)
    assert watch.products == 3


def test_a_second_derivative_is_refused_and_not_wrong():
    x, weight, _, labels = problem(5)
    x.requires_grad_()
    with pytest.raises(RuntimeError):
        (slope,) = torch.autograd.grad(fused(x, weight, labels).square(), x, create_graph=True)
        slope.square().sum().backward()
