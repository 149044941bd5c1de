"""A window's cache against the whole text at once, whatever is done to its rows."""

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from qkv.decode import Batcher, Beam, Greedy, Session, decode
from qkv.errors import QkvError
from qkv.masks import Causal, Global, Mask, Prefix, Window
from qkv.models import Module
from qkv.parts import ALiBi, Attention, Position, Relative, Rotary
from qkv.spec import edit
from qkv.state import KV, Rolling, State
from qkv.state.rolling import SLACK
from tests.contracts.specs import VOCAB, decoder, rough
from tests.zoo.parity import END, SIZES, check_search, loaded, relative, texts
from tests.zoo.parity import rough as rough_weights

ROOM = 150
MASKS: dict[str, Mask] = {
    "window": Window(5),
    "itself alone": Window(1),
    "sinks": Causal() & (Window(4) | Global(2)),
    "sinks without a window": Global(3),
}
POSITIONS: dict[str, Position | None] = {
    "rotary": Rotary(), "alibi": ALiBi(), "relative": Relative(buckets=8, far=16, both=False), "none": None,
}  # fmt: skip


@cache
def model(mask: str, position: str = "rotary") -> Module:
    return rough(decoder(Attention(4, kv_heads=2, mask=MASKS[mask], position=POSITIONS[position])))


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def held(state: State) -> Rolling:
    cell = state.cells[0]["attn"]
    assert isinstance(cell, Rolling)
    return cell


@pytest.fixture(params=[3, SLACK])
def slack(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("qkv.state.rolling.SLACK", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts", [[66, *[1] * 20, 54], [60, 1, 1, 3, 4, 5, 66], [2, 70, 64, 4]], ids=["steps", "a", "b"]
)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_chunks_of_any_length_equal_the_whole(mask, position, cuts, slack):
    made, text = model(mask, position), ids(2, 140)
    state = made.new_state(2, ROOM)
    found = torch.cat([made(chunk, state=state) for chunk in text.split(cuts, 1)], 1)
    torch.testing.assert_close(found, made(text), rtol=0, atol=1e-9)
    assert held(state).k.shape[2] == min(ROOM, held(state).reach.first + held(state).reach.behind + slack) + 1


class Rows:
    """Rows of a state, and the text of each."""

    def __init__(self, made: Module, state: State, texts: list[Tensor]) -> None:
        self.made, self.state, self.texts = made, state, texts

    def feed(self, lengths: list[int], seed: int) -> None:
        """So many tokens to each row; what it says is what the whole text says."""
        more, T = ids(len(lengths), max(lengths), seed), max(lengths)
        out = self.made(more, state=self.state, lengths=None if min(lengths) == T else torch.tensor(lengths))
        self.texts = [torch.cat((text, new[:n])) for text, new, n in zip(self.texts, more, lengths, strict=True)]
        for text, found, n in zip(self.texts, out, lengths, strict=True):
            if n:
                expected = self.made(text[None])[0, -n:]
                torch.testing.assert_close(found[:n], expected, rtol=0, atol=1e-9)

    def back(self, mark, texts: list[Tensor], after: int, seed: int) -> None:
        """Back to `after` tokens behind the mark."""
        again, kept = self.state.rewind(mark, after), [len(text) + after for text in texts]
        assert 0 <= again <= after
        late = [text[: n - again] for text, n in zip(self.texts, kept, strict=True)]
        fed = torch.stack([text[n - again : n] for text, n in zip(self.texts, kept, strict=True)])
        self.texts = late
        if again:
            self.made(fed, state=self.state)
            self.texts = [torch.cat(pair) for pair in zip(late, fed, strict=True)]
        assert self.state.lengths.tolist() == kept


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mask", MASKS)
def test_rows_are_chosen_joined_forked_and_taken_back_in_any_order(mask, seed, monkeypatch):
    chance = random.Random(seed)
    monkeypatch.setattr("qkv.state.rolling.SLACK", chance.choice((1, 3, 8)))
    made = model(mask)
    rows = Rows(made, made.new_state(2, ROOM), [torch.zeros(0, dtype=torch.long)] * 2)
    marked = None
    for step in range(40):
        count, longest = len(rows.texts), max(len(text) for text in rows.texts)
        do = chance.choice(("step", "step", "chunk", "ragged", "select", "join", "fork", "mark", "back", "back"))
        if longest > ROOM - 20:
            marked = None
            rows = Rows(made, made.new_state(2, ROOM), [torch.zeros(0, dtype=torch.long)] * 2)
        elif do == "step":
            rows.feed([1] * count, step)
        elif do == "chunk":
            rows.feed([chance.choice((2, 5, 17))] * count, step)
        elif do == "ragged":
            rows.feed([chance.choice((0, 1, 4, 12)) for _ in range(count - 1)] + [chance.choice((2, 12))], step)
        elif do == "select":
            chosen = [chance.randrange(count) for _ in range(chance.choice((1, 2, 3)))]
            rows.state.select(torch.tensor(chosen))
            rows.texts, marked = [rows.texts[n] for n in chosen], None
        elif do == "join" and count < 4:
            other = Rows(made, made.new_state(1, ROOM), [torch.zeros(0, dtype=torch.long)])
            other.feed([chance.choice((1, 30))], step)
            rows.state.join(other.state)
            rows.texts, marked = rows.texts + other.texts, None
        elif do == "fork":
            left, room = rows.state, max(longest, chance.choice((1, 60)))
            chosen = list(reversed(range(count))) if chance.random() < 0.5 else None
            rows.state = left.fork(None if chosen is None else torch.tensor(chosen), room).fork(room=ROOM)
            if chosen is not None:
                rows.texts, marked = [rows.texts[n] for n in chosen], None
            made(ids(count, 9, step), state=left)  # which the fork does not see
        elif do == "mark":
            marked = rows.state.mark(), rows.texts
        elif do == "back" and marked:
            mark, texts = marked
            common = min(len(now) - len(then) for now, then in zip(rows.texts, texts, strict=True))
            rows.back(mark, texts, chance.randint(0, common), step)


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 3, 20])
@pytest.mark.parametrize("mask", ["window", "sinks", "itself alone"])
def test_tokens_are_fed_again_exactly_where_the_slack_ends(mask, at, monkeypatch):
    monkeypatch.setattr("qkv.state.rolling.SLACK", 3)
    made, text = model(mask), ids(1, 40)
    whole = made(text)
    for fed, steps in [(1, True), (3, True), (4, True), (4, False), (5, True), (13, True), (13, False)]:
        for keep in range(fed + 1):
            state = made.new_state(1, ROOM)
            if at:
                made(text[:, :at], state=state)
            mark = state.mark()
            for chunk in text[:, at : at + fed].split(1 if steps else fed, 1):
                made(chunk, state=state)
            kept = at + fed <= held(state).room or fed - keep <= 3 or at + keep <= held(state).reach.first
            again = state.rewind(mark, keep)
            assert again == (0 if kept else keep)
            n = at + keep - again
            found = torch.cat([made(text[:, t : t + 1], state=state) for t in range(n, n + 2)], 1)
            torch.testing.assert_close(found, whole[:, n : n + 2], rtol=0, atol=1e-9)


@torch.no_grad()
def test_within_the_slack_nothing_is_fed_again_and_beyond_it_all_since_the_mark():
    made, text = model("window"), ids(1, 400)
    state = made.new_state(1, 400)
    beginning = state.mark()
    made(text[:, :100], state=state)
    mark = state.mark()
    ring = held(state).k
    made(text[:, 100 : 100 + SLACK], state=state)
    assert held(state).k is ring  # no copy is made for the mark
    assert state.rewind(mark, 0) == 0
    made(text[:, 100:300], state=state)
    assert state.rewind(mark, 200 - SLACK) == 0
    assert state.rewind(mark, 30) == 30 and state.lengths.tolist() == [100]
    torch.testing.assert_close(made(text[:, 100:200], state=state), made(text[:, :200])[:, 100:], rtol=0, atol=1e-9)
    assert state.rewind(mark, 0) == 0 and state.rewind(mark, 0) == 0  # as often as one likes
    assert state.rewind(beginning, 50) == 50 and state.lengths.tolist() == [0]
    torch.testing.assert_close(made(text[:, :90], state=state), made(text[:, :90]), rtol=0, atol=1e-9)
    assert state.rewind(beginning, 80) == 0
    made(text[:, 80:300], state=state)
    other = state.fork(torch.tensor([0, 0]))
    late = other.mark()
    other.select(torch.tensor([1, 0]))
    made(text[:, :90].expand(2, -1), state=other)
    with pytest.raises(QkvError, match="other rows stand in this state than when it was marked"):
        other.rewind(late, 0)


@torch.no_grad()
def test_a_text_shorter_than_the_ring_goes_back_as_far_as_one_likes():
    made, text = model("window"), ids(1, 60)
    state = made.new_state(1, 1000)
    beginning = state.mark()
    made(text, state=state)
    assert state.rewind(beginning, 3) == 0
    torch.testing.assert_close(made(text[:, 3:9], state=state), made(text[:, :9])[:, 3:], rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_layer_that_must_begin_again_takes_the_window_with_it():
    """The recurrence goes back to the mark itself, which lies further back than what was asked for."""
    spec = edit(decoder(Attention(4, mask=Window(3))), "stack.1.attn.f", {"kind": "mamba"})
    made, text = rough(spec), ids(1, 300)
    state = made.new_state(1, 300)
    made(text[:, :20], state=state)
    mark = state.mark()
    made(text[:, 20:200], state=state)
    assert state.rewind(mark, 170) == 170 and state.lengths.tolist() == [20]
    torch.testing.assert_close(made(text[:, 20:40], state=state), made(text[:, :40])[:, 20:], rtol=0, atol=1e-9)


@torch.no_grad()
def test_memory_is_bounded_and_stated():
    made, text = model("sinks"), ids(2, 140)
    most = 3 * 2 * (2 * 4) * (2 + 3 + SLACK + 1) * 8  # layers, k and v, heads × width, slots, fp64
    for room in (70, 140, 100_000):
        state = made.new_state(2, room)
        made(text[:, :70], state=state)
        assert state.bytes() == state.needs([room, 9]) == 2 * most
    assert made.new_state(1, 20).needs([20]) == 3 * 2 * 8 * 21 * 8
    assert made.new_state(1, 1).needs([10**9] * 3) == 3 * most


@torch.no_grad()
def test_a_prefix_within_a_window_is_seen_from_both_sides():
    spec = edit(decoder(Attention(4, mask=Window(4), position=Rotary())), "mask", Causal() | Prefix())
    made, text, prefix = rough(spec), ids(2, 120), torch.tensor([6, 90])
    whole, state = made(text, prefix=prefix), made.new_state(2, 120, prefix=prefix)
    found = torch.cat([made(chunk, state=state) for chunk in text.split([100, 3, 17], 1)], 1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)


def test_what_sees_everything_keeps_everything():
    state = rough(decoder(Attention(4, mask=Causal()))).new_state(1, 1000)
    assert type(state.cells[0]["attn"]) is KV and state.cells[0]["attn"].room == 1000


# --- against the transformers package, and through searches ---


@torch.no_grad()
def test_mistral_steps_searches_and_chats_past_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = rough_weights(MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=7)))
    ours, ids = loaded(theirs, tmp_path), texts(2, 97)[0]
    state, cache = ours.new_state(2, 97), DynamicCache(config=theirs.config)
    for chunk in ids.split([30, 1, 1, 65], 1):  # of which the last two laps of the ring are one call
        assert relative(ours(chunk, state=state), theirs(chunk, past_key_values=cache).logits) < 1e-5
    assert state.cells[0]["attn"].k.shape[2] == 6 + SLACK + 1
    monkeypatch.setattr("qkv.state.rolling.SLACK", 2)
    check_search(theirs, ours)
    session = Session(ours, reserved=60)
    engine, ids = Batcher(ours, rows=4, chunk=5), ids[0].tolist()
    for text in (ids[:30], ids[:40], [*ids[:25], *ids[50:60]], ids[:29], ids[:6]):
        assert relative(session.feed(text).x, ours(torch.tensor([text]))[:, -1]) < 1e-5
        for search in (Greedy(), Beam(size=3)):
            alone = decode(ours, [text], search, limits=[9], ends=END)[0]
            found = engine.add(text, search, limit=9, ends={END}).result()
            assert [one.ids for one in found] == [one.ids for one in alone]
