"""The selective scan: naive against the definition and against `recall`, segments against naive with every gradient."""

import itertools

import pytest
import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops import recall
from qkv.ops.scan import chunked, naive

ROWS, D, N = 2, 6, 5
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(T: int) -> dict[str, Tensor]:
    torch.manual_seed(T)
    shapes = {
        "x": (ROWS, T, D),
        "dt": (ROWS, T, D),
        "A": (D, N),
        "B": (ROWS, T, N),
        "C": (ROWS, T, N),
        "h": (ROWS, D, N),
    }
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return found | {"dt": found["dt"].abs(), "A": -found["A"].exp()}


def gradients(form, x: dict[str, Tensor], **options) -> list[Tensor]:
    """Output, last state, and the gradient of everything that went in for fixed random cotangents."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in x.items()}
    found = form(**leaves, **options)
    random = torch.Generator().manual_seed(7)
    loss = sum(
        (y * torch.randn(y.shape, generator=random, dtype=torch.float64)).sum() for y in (found.out, found.state)
    )
    return [found.out.detach(), found.state.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def test_naive_is_the_definition():
    T, x = 4, inputs(4)
    found = naive(**x)
    for b, d in itertools.product(range(ROWS), range(D)):
        h = x["h"][b, d]
        for t in range(T):
            dt = x["dt"][b, t, d]
            h = torch.exp(dt * x["A"][d]) * h + dt * x["x"][b, t, d] * x["B"][b, t]
            torch.testing.assert_close(found.out[b, t, d], h @ x["C"][b, t], **EXACT)
        torch.testing.assert_close(found.state[b, d], h, **EXACT)
    del x["h"]
    torch.testing.assert_close(naive(**x).out, naive(**x, h=torch.zeros(ROWS, D, N).double()).out, **EXACT)


def test_it_is_recall_with_one_value_a_head():
    x = inputs(70)
    q, k, v = x["C"][:, None], x["B"][:, None], (x["dt"] * x["x"]).mT[..., None]
    g = (x["dt"][..., None] * x["A"]).transpose(1, 2)
    expected, found = recall.chunked(q, k, v, g, state=x["h"][..., None]), chunked(**x)
    torch.testing.assert_close(found.out, expected.out[..., 0].mT, **EXACT)
    torch.testing.assert_close(found.state, expected.state[..., 0], **EXACT)


@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 200])
def test_segments_are_the_recurrence(T):
    x = inputs(T)
    for found, expected in zip(gradients(chunked, x), gradients(naive, x), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("T", [1, 65, 130])
@pytest.mark.parametrize("rows", [1, ROWS])
def test_documents_begin_with_nothing(T, rows):
    x, first = inputs(T), torch.rand(rows, T, generator=torch.Generator().manual_seed(3)) < 0.1
    first[:, 63:66] = torch.tensor([True, False, True])[: max(T - 63, 0)]
    expected = gradients(naive, x, first=first)
    for found, one in zip(gradients(chunked, x, first=first), expected, strict=True):
        torch.testing.assert_close(found, one, **EXACT)
    for row in range(ROWS):
        starts = [0, *first[row % rows].nonzero().flatten().tolist(), T]
        begun, outs = x["h"][row : row + 1], []
        for start, end in itertools.pairwise(starts):
            piece = {name: x[name][row : row + 1, start:end] for name in ("x", "dt", "B", "C")}
            if end > start:
                outs.append(naive(**piece, A=x["A"], h=begun).out)
            begun = torch.zeros_like(begun)
        torch.testing.assert_close(torch.cat(outs, 1), expected[0][row : row + 1], **EXACT)


def test_the_size_of_a_segment_changes_nothing():
    x = inputs(20)
    for found, expected in zip(gradients(chunked, x, segment=7), gradients(naive, x), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_state_goes_on_where_it_stopped():
    x = inputs(90)
    whole, A, h, outs = naive(**x), x.pop("A"), x.pop("h"), []
    for piece in zip(*(value.split([1, 64, 3, 22], 1) for value in x.values()), strict=True):
        found = chunked(**dict(zip(x, piece, strict=True)), A=A, h=h)
        outs, h = [*outs, found.out], found.state
    torch.testing.assert_close((torch.cat(outs, 1), h), (whole.out, whole.state), **EXACT)


def test_no_step_changes_nothing():
    x = inputs(70)
    x["dt"][:, 50:] = 0.0
    ended = naive(**{name: value[:, :50] if name in ("x", "dt", "B", "C") else value for name, value in x.items()})
    assert torch.equal(chunked(**x).state, chunked(**x, segment=50).state)
    torch.testing.assert_close(chunked(**x).state, ended.state, **EXACT)


def test_half_precision_goes_in_and_out_and_the_state_stays_single():
    x = {name: value.bfloat16() for name, value in inputs(70).items()}
    found, exact = chunked(**x), naive(**{name: value.double() for name, value in x.items()})
    assert (found.out.dtype, found.state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(found.state.double(), exact.state, rtol=1e-4, atol=1e-4)
    x = {name: value.float() for name, value in x.items()}
    with torch.autocast("cpu", torch.bfloat16):
        inside = chunked(**x)
    assert torch.equal(inside.out, chunked(**x).out)


def test_what_does_not_fit_is_refused():
    x = inputs(4)
    for name in ("dt", "A", "B", "C"):
        with pytest.raises(QkvError, match="scan: found x, dt, A, B, C of"):
            chunked(**{**x, name: x[name][:1]})
    with pytest.raises(QkvError, match="found a state"):
        naive(**{**x, "h": x["h"].mT})
