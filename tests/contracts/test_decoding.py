"""Contract 1 and 2: every way to feed a decoder gives the same scores; no output knows the future or the padding."""

import pytest
import torch

from qkv.errors import QkvError
from qkv.masks import Full
from qkv.models import Module
from qkv.spec import edit
from qkv.state import State
from tests.contracts.specs import VOCAB, decoder, decoders, pairs, prefix_decoder, rough

DECODERS, PAIRS = decoders(), pairs()
CLOSE = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest) -> Module:
    return rough(DECODERS[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def feed(model: Module, ids: torch.Tensor, cuts: list[int], state: State) -> torch.Tensor:
    return torch.cat([model(chunk, state=state) for chunk in ids.split(cuts, 1)], 1)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[6, *[1] * 11], [1, 5, 2, 9], [17], [1] * 17], ids=str)
def test_chunks_equal_the_whole(model, ids, cuts):
    torch.testing.assert_close(feed(model, ids, cuts, model.new_state(3, 20)), model(ids), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_on_any_side_changes_nothing(model, ids, side):
    valid = torch.ones(3, 17, dtype=torch.bool)
    places = {"left": slice(0, 5), "right": slice(12, 17), "between": slice(3, 8)}[side]
    valid[1, places] = False
    out = model(ids, valid=valid)
    alone = model(ids[1:2, valid[1]])
    torch.testing.assert_close(out[1:2, valid[1]], alone, **CLOSE)
    torch.testing.assert_close(out[[0, 2]], model(ids[[0, 2]]), **CLOSE)
    other = torch.where(valid, ids, (ids + 5) % VOCAB)
    assert torch.equal(model(other, valid=valid)[valid], out[valid])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_step_select_and_rewind_as_each_row_alone(model, ids, side):
    whole, lengths, rows = model(ids), torch.tensor([6, 3, 5]), torch.arange(3)
    padded, valid = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.bool)
    for row, n in enumerate(lengths.tolist()):
        place = slice(6 - n, 6) if side == "left" else slice(0, n)
        padded[row, place], valid[row, place] = ids[row, :n], True
    state = model.new_state(3, 30)
    out = model(padded, valid=valid, state=state)
    for row, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(out[row, valid[row]], whole[row, :n], **CLOSE)
    at = lengths.clone()
    for _ in range(4):
        out = model(ids[rows, at][:, None], state=state)
        torch.testing.assert_close(out[:, 0], whole[rows, at], **CLOSE)
        at += 1
    mark = state.mark()
    draft = torch.stack([ids[row, n : n + 5] for row, n in enumerate(at.tolist())])
    wrong = draft.clone()
    wrong[:, 2:] = (wrong[:, 2:] + 7) % VOCAB
    model(wrong, state=state)
    again = state.rewind(mark, keep=2)
    if again:
        model(draft[:, 2 - again : 2], state=state)
    out = model(draft[:, 2:3], state=state)
    torch.testing.assert_close(out[:, 0], whole[rows, at + 2], **CLOSE)
    chosen, at = torch.tensor([2, 0, 0]), at + 3
    state.select(chosen)
    out = model(ids[chosen, at[chosen]][:, None], state=state)
    torch.testing.assert_close(out[:, 0], whole[chosen, at[chosen]], **CLOSE)
    assert state.lengths.tolist() == (at[chosen] + 1).tolist()


@torch.no_grad()
def test_no_output_knows_a_later_token(model, ids):
    before = model(ids)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB
    after = model(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9], **CLOSE)
    assert not torch.allclose(after[:, 9:], before[:, 9:])


@torch.no_grad()
def test_a_row_of_padding_is_finite(model, ids):
    valid = torch.ones(3, 17, dtype=torch.bool)
    valid[1] = False
    assert model(ids, valid=valid).isfinite().all()


def test_recomputed_gradients_are_the_gradients(model, ids):
    model.train()
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)  # dropout draws the same in both
        model.recompute(on).zero_grad()
        model(ids).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)


# --- encoder and decoder together ---


@torch.no_grad()
@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_decoder_steps_as_it_learns(name, ids):
    model = rough(PAIRS[name])
    source = torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(2))
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[1, :4] = valid[2, 7:] = False
    memory = model.encode(source, valid=valid)
    whole = model(ids, **memory)
    for row in range(3):
        alone = model(ids[row : row + 1], **model.encode(source[row : row + 1, valid[row]]))
        torch.testing.assert_close(whole[row : row + 1], alone, **CLOSE)
    state = model.new_state(3, 20, **memory)
    torch.testing.assert_close(feed(model, ids, [4, 1, 1, 11], state), whole, **CLOSE)
    chosen = torch.tensor([0, 0, 1, 1, 2, 2])  # beams: the memory is neither copied nor projected again
    state = model.new_state(3, 20, **memory)
    held = state.cells[0]["cross"].k
    state.select(chosen).select(torch.tensor([1, 1, 2, 3, 5, 4]))
    assert state.cells[0]["cross"].k is held
    torch.testing.assert_close(feed(model, ids[chosen, :3], [2, 1], state), whole[chosen, :3], **CLOSE)
    state.select(torch.tensor([5, 0, 1]))
    out = model(ids[torch.tensor([2, 0, 0]), 3:4], state=state)
    torch.testing.assert_close(out[:, 0], whole[torch.tensor([2, 0, 0]), 3], **CLOSE)


@torch.no_grad()
def test_a_prefix_is_seen_from_both_sides_and_must_come_whole(ids):
    model, prefix = rough(prefix_decoder()), torch.tensor([5, 3, 6])
    whole = model(ids, prefix=prefix)
    state = model.new_state(3, 20, prefix=prefix)
    torch.testing.assert_close(feed(model, ids, [6, 1, 1, 9], state), whole, **CLOSE)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    assert not torch.allclose(model(changed, prefix=prefix)[:, 0], whole[:, 0])
    with pytest.raises(QkvError, match="a chunk ends inside a bidirectional prefix"):
        feed(model, ids, [4, 13], model.new_state(3, 20, prefix=prefix))


def test_what_cannot_be_is_refused_in_a_sentence(ids):
    model = rough(decoder())
    state = model.new_state(3, 5)
    with pytest.raises(QkvError, match="room for 5 tokens and 17 were fed"):
        model(ids, state=state)
    with pytest.raises(QkvError, match="keeps no state"):
        rough(edit(decoder(), "mask", Full())).new_state(1, 5)
    with pytest.raises(QkvError, match="40 positions"):
        rough(DECODERS["embedding learned"])(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(QkvError, match=r"shape \(batch, tokens\)"):
        model(ids[0])
