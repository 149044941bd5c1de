"""RNN, GRU and LSTM against torch's own on each row alone, and both directions against its bidirectional form."""

import pytest
import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.masks import Causal, Full, Mask, Same, Window
from qkv.parts import GRU, LSTM, RNN, Bidirectional, Fourier, Mixer
from qkv.parts.mixers import Body
from qkv.state import Recurrent
from tests.parts.helpers import run, seeded, wild

C, H, T = 6, 5, 11
LENGTHS = torch.tensor([T, 4, 1, 0, 8])
KERNELS = {RNN: nn.RNN, GRU: nn.GRU, LSTM: nn.LSTM}
each = pytest.mark.parametrize("kind", KERNELS)
close = torch.testing.assert_close


def tokens(rows: int = len(LENGTHS), length: int = T, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, C, dtype=torch.float64, generator=seeded(seed))


def built(spec: Mixer) -> Body:
    body = wild(spec.build(C))
    assert isinstance(body, Body)
    return body


def oracle(body: Body) -> nn.RNNBase:
    """torch's own, with the weights of a body."""
    theirs = KERNELS[type(body.spec)](C, body.kernel.hidden_size, batch_first=True).double()
    theirs.load_state_dict(body.kernel.state_dict())
    return theirs


def feed(body: Body, x: Tensor, cell: Recurrent | None, lengths: Tensor | None = None, mask: Mask | None = None):
    context = Context(torch.arange(x.shape[1])[None], mask or Causal(), None, lengths)
    body.view, context.views = 0, [body.prepare(context, cell, x.shape[1])]
    return body(x, context, cell)


@each
@pytest.mark.parametrize("hidden", [None, C, H])
def test_each_row_is_what_torch_says_of_it_alone(kind, hidden):
    body, x = built(kind(hidden)), tokens()
    theirs = oracle(body)
    cell = body.new_cell(len(x), T, {})
    out = run(body, x, Causal(), LENGTHS)
    close(feed(body, x, cell, LENGTHS), out)
    assert (body.out is None) == (hidden != H) and out.isfinite().all()
    for row, n in enumerate(LENGTHS.tolist()):
        y, last = theirs(x[row : row + 1, :n]) if n else (x[:1, :0], None)
        states = {name: value[row] for name, value in cell.now.items()}
        if n:
            close(out[row, :n], (y if body.out is None else y @ body.out.weight.T)[0])
            for value, expected in zip(states.values(), last if kind is LSTM else (last,), strict=True):
                close(value, expected[0, 0])
        else:
            assert not any(value.any() for value in states.values())


@each
def test_a_row_goes_on_where_it_was(kind):
    body, x = built(kind(H)), tokens()
    whole, cell = run(body, x, Causal()), body.new_cell(len(x), T, {})
    first = feed(body, x[:, :5], cell, lengths=torch.tensor([5, 3, 0, 1, 5]))
    assert not cell.now["h"][2].any() and cell.now.keys() == ({"h", "c"} if kind is LSTM else {"h"})
    rest = feed(body, torch.stack([x[0, 5:9], x[1, 3:7], x[2, 0:4], x[3, 1:5], x[4, 5:9]]), cell)
    for row, n in enumerate([5, 3, 0, 1, 5]):
        close(torch.cat((first[row, :n], rest[row])), whole[row, : n + 4])
    before = cell.now["h"]
    feed(body, x[:, :2], cell, lengths=torch.tensor([0, 2, 0, 0, 0]))
    assert (cell.now["h"] == before).all(1).tolist() == [True, False, True, True, True]


@each
def test_gradients_are_torch_s(kind):
    body, x = built(kind()), tokens(3)
    theirs, weight = oracle(body), tokens(3, seed=2)
    (run(body, x, Causal()) * weight).sum().backward()
    (theirs(x)[0] * weight).sum().backward()
    for name, parameter in theirs.named_parameters():
        close(body.kernel.get_parameter(name).grad, parameter.grad)


@each
def test_documents_that_share_a_row_know_nothing_of_each_other(kind):
    body, x = built(kind(H)), tokens(2)
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 7, 7, 7, 7]])
    lengths = torch.tensor([T, 9])
    out = run(body, x, Causal() & Same(), lengths, given={"segments": segments})
    for row, (n, marks) in enumerate(zip(lengths.tolist(), segments, strict=True)):
        real = marks[:n]
        for mark in real.unique():
            close(out[row, :n][real == mark], run(body, x[row : row + 1, :n][:, real == mark], Causal())[0])
    alone, cell = body.new_cell(2, T, {}), body.new_cell(2, T, {})
    feed(body, x[:, :3], cell), feed(body, x[:, :3], alone)
    feed(body, x[:, 3:], cell, torch.tensor([3, 1]), Window(1))  # a mask under which each token stands by itself
    for row, n in enumerate([3, 1]):
        fresh = body.new_cell(1, T, {}) if n > 1 else alone.fork(torch.tensor([row]), T)
        feed(body, x[row : row + 1, 2 + n : 3 + n], fresh)
        close(cell.now["h"][row], fresh.now["h"][0])


@each
def test_in_half_precision_and_under_autocast(kind):
    torch.manual_seed(0)
    body, x = kind(H).build(C), tokens().float()
    whole = run(body, x, Causal(), LENGTHS)
    cell = body.new_cell(len(x), T, {})
    with torch.autocast("cpu", torch.bfloat16):
        half = feed(body, x, cell, LENGTHS)
        assert cell.now["h"].dtype == torch.float32
        close(feed(body, x.bfloat16(), None, LENGTHS).float(), half.float(), rtol=0, atol=0.05)
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()
    cell = body.bfloat16().new_cell(len(x), T, {})
    out = feed(body, x.bfloat16(), cell, LENGTHS)
    assert out.dtype == torch.bfloat16 and cell.now["h"].dtype == torch.float32
    assert (out - whole).abs().max() < 0.05 * whole.abs().max()


@each
def test_both_directions_are_torch_s_bidirectional_form(kind):
    """W_o of both states side by side; each row alone, whose end is where the way back begins."""
    body, x = built(Bidirectional(kind(H))), tokens()
    theirs = KERNELS[kind](C, H, batch_first=True, bidirectional=True).double()
    weights = dict(body.ahead.kernel.state_dict())
    weights |= {f"{name}_reverse": value for name, value in body.back.kernel.state_dict().items()}
    theirs.load_state_dict(weights)
    project = torch.cat((body.ahead.out.weight, body.back.out.weight), 1)
    out = run(body, x, Full(), LENGTHS)
    for row, n in enumerate(LENGTHS.tolist()):
        if n:
            close(out[row, :n], (theirs(x[row : row + 1, :n])[0] @ project.T)[0])
    close(run(body, x), theirs(x)[0] @ project.T)
    assert out.isfinite().all()


@pytest.mark.parametrize("spec", [GRU(H), LSTM()], ids=str)
def test_documents_are_read_from_both_of_their_ends(spec):
    body, x = built(Bidirectional(spec)), tokens(2)
    segments = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 7, 7, 7, 7]])
    out = run(body, x, Same(), torch.tensor([T, 9]), given={"segments": segments})
    close(out[0, 4:8], run(body, x[:1, 4:8])[0])
    close(out[1, 7:9], run(body, x[1:, 7:9])[0])
    order = torch.arange(T).flip(0).expand(2, -1)  # the caller's rows were turned round before they came here
    context = Context(torch.arange(T)[None], Same(), 0, order=order, given={"segments": segments.flip(1)})
    whole = run(body, x, Same(), given={"segments": segments})
    close(body(x, context), whole)


def test_what_cannot_be_is_refused_in_a_sentence():
    with pytest.raises(QkvError, match="a hidden width of 0 holds nothing"):
        LSTM(0)
    with pytest.raises(QkvError, match="Fourier sees both sides already"):
        Bidirectional(Fourier())
    both = Bidirectional(GRU()).build(C)
    for refused in (lambda: both.new_cell(1, 5, {}), lambda: run(both, tokens(), Causal())):
        with pytest.raises(QkvError, match=r"^Bidirectional sees tokens to come, .*: use the mask Full\(\)$"):
            refused()
