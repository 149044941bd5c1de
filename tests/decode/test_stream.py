"""One text that grows: the same ids as a search, the same numbers as a fresh run, the same text however it is cut."""

import random
from importlib import import_module
from itertools import pairwise

import pytest
import torch

from qkv.decode import Greedy, Sample, Session, decode, stream
from qkv.decode.stream import until
from qkv.errors import QkvError
from qkv.models import Module
from tests.contracts.specs import ROOM, VOCAB, decoders, rough

KINDS = {name: spec for name, spec in decoders().items() if not name.startswith(("norm", "gate"))}
FEW = ["mixer attention", "mixer mamba", "mixer mamba2", "window in every other layer", "gemma-3-270m", "shared layers"]


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def fresh(model: Module, text: list[int]) -> torch.Tensor:
    """Scores of the next token, without a state."""
    with torch.inference_mode():
        return model(torch.tensor([text]))[0, -1].float()


class Counting:
    """Counts the tokens that a model is fed."""

    def __init__(self, model: Module) -> None:
        self.fed = 0
        inner = model.hidden

        def hidden(text: torch.Tensor, **given: object) -> torch.Tensor:
            self.fed += text.shape[1]
            return inner(text, **given)

        model.hidden = hidden

    def take(self) -> int:
        fed, self.fed = self.fed, 0
        return fed


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("search", [Greedy(), Sample(seed=3, top_p=0.9)], ids=["greedy", "sample"])
def test_a_stream_is_a_search_of_one_row(kind, search):
    model = rough(decoders()[kind])
    for seed, prompt in enumerate((ids(1), ids(9, 1))):
        whole = decode(model, [prompt], search, limits=[20], ends=None, seeds=[seed])[0][0].ids
        assert list(stream(model, prompt, search, limit=20, seed=seed)) == whole
        ends = {whole[7], whole[11]}
        short = decode(model, [prompt], search, limits=[20], ends=ends, seeds=[seed])[0][0]
        assert short.ended and len(short.ids) <= 7
        assert list(stream(model, prompt, search, limit=20, ends=ends, seed=seed)) == short.ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_gives_what_a_fresh_run_gives(kind):
    model = rough(KINDS[kind])
    session, base = Session(model), ids(14)
    texts = [
        base[:5],
        base[:9],  # longer
        base[:10],
        [*base[:6], *ids(5, 1)],  # changed in the middle
        base[:4],  # shorter
        base[:4],  # the same
        base,  # longer than there was room for
        ids(8, 2),  # another
        [*ids(8, 2), 1],
    ]
    for text in texts:
        found = session.feed(text, min(len(text) + 2, ROOM)).x
        assert found.shape == (1, VOCAB) and found.dtype == torch.float32
        assert float((found[0] - fresh(model, text)).abs().max()) < 1e-5, text


@pytest.mark.parametrize("kind", ["mixer attention", "mixer mamba", "window in every other layer"])
def test_only_what_is_new_is_fed(kind):
    model = rough(decoders()[kind])
    count, session, base = Counting(model), Session(model, ROOM), ids(20)
    recurrent = kind == "mixer mamba"
    session.feed(base[:8])
    assert count.take() == 8
    session.feed(base[:13])
    assert count.take() == 5
    session.feed([*base[:11], 1, 2, 3])
    assert count.take() == (14 if recurrent else 3)  # a recurrence cannot go back
    session.feed([*base[:11], 1, 2, 3])
    assert count.take() == (14 if recurrent else 1)  # for whose next token log p is asked
    list(stream(model, [*base[:11], 1, 2, 3, 4], Greedy(), limit=6, session=session))
    assert count.take() == 1 + 5  # the last token is not read


def test_a_step_does_not_look_back(monkeypatch):
    module = import_module("qkv.decode.stream")  # the package's own `stream` is the function
    looked, inner = [], module.shared
    monkeypatch.setattr(module, "shared", lambda old, new: looked.append(len(new)) or inner(old, new))
    model = rough(decoders()["mixer attention"])
    session, prompt = Session(model), ids(5)
    made = list(stream(model, prompt, Greedy(), limit=20, session=session))
    assert looked == [5] and session.ids == [*prompt, *made[:-1]]
    list(stream(model, [*prompt, *made], Greedy(), limit=5, session=session))
    assert looked == [5, 25]


@pytest.mark.parametrize("kind", ["mixer attention", "mixer mamba"])
def test_streams_may_take_turns_with_one_session(kind):
    model = rough(decoders()[kind])
    prompts = [ids(6), [*ids(4), 1, 2, 3], ids(9, 1)]
    wanted = [list(stream(model, prompt, Greedy(), limit=8)) for prompt in prompts]
    session = Session(model)
    running = [stream(model, prompt, Greedy(), limit=8, session=session) for prompt in prompts]
    found = list(zip(*running, strict=True))
    assert [list(row) for row in zip(*found, strict=True)] == wanted


def test_more_begins_anew_where_there_is_no_room():
    model, text = rough(decoders()["mixer attention"]), ids(20)
    session = Session(model)
    session.feed(text[:3])
    for n in range(3, 20, 2):
        found = session.more(text[n : n + 2]).x
        assert float((found[0] - fresh(model, text[: n + 2])).abs().max()) < 1e-5
    assert session.ids == text and session.state.room == 24


def test_room_is_doubled_and_bounded_by_the_positions():
    model = rough(decoders()["embedding learned"])
    session, rooms = Session(model), []
    for length in range(1, ROOM + 1):
        session.feed(ids(length))
        rooms.append(session.state.room)
    assert sorted({b for a, b in pairwise([0, *rooms]) if a != b}) == [1, 2, 4, 8, 16, 32, 40]
    with pytest.raises(QkvError, match="room for 41 tokens was asked for; the model has 40 positions"):
        session.feed(ids(ROOM + 1))
    assert float((session.feed(ids(7)).x[0] - fresh(model, ids(7))).abs().max()) < 1e-5  # the session goes on
    reserved = Session(model, 1000)
    reserved.feed([1])
    assert reserved.state.room == ROOM


def test_all_positions_can_be_used():
    model = rough(decoders()["embedding learned"])
    assert len(list(stream(model, ids(30), Greedy(), limit=11))) == 11  # 40 are read, the eleventh is written
    assert len(list(stream(model, ids(ROOM), Greedy(), limit=1))) == 1
    with pytest.raises(QkvError, match="41 tokens"):
        list(stream(model, ids(30), Greedy(), limit=12))
    assert list(stream(model, ids(30), Greedy(), limit=0)) == []


@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba", "mixer linear-attention", "window and sinks"])
def test_a_step_that_is_broken_off_leaves_a_session_that_goes_on(name):
    model = rough(decoders()[name])
    session, base = Session(model, ROOM), ids(12)
    session.feed(base)
    last = model.stack.get_submodule("2")
    inner = last.forward

    def broken(*_: object) -> torch.Tensor:  # when the other layers have read on
        raise KeyboardInterrupt

    for text in ([*base, 3, 4], [*base[:5], 1, 2]):
        last.forward = broken
        with pytest.raises(KeyboardInterrupt):
            session.feed(text)
        last.forward = inner
        assert float((session.feed(text).x[0] - fresh(model, text)).abs().max()) < 1e-5
    for text in (base, [*base[:5], 1, 2]):
        assert float((session.feed(text).x[0] - fresh(model, text)).abs().max()) < 1e-5


def test_nothing_cannot_be_continued():
    model = rough(decoders()["mixer attention"])
    with pytest.raises(QkvError, match="a prompt needs at least one token"):
        Session(model).feed([])


def test_a_text_ends_before_the_first_stop_string_however_it_is_cut():
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choices("ab", k=chance.randrange(12)))
        stop = ["".join(chance.choices("ab", k=chance.randint(1, 4))) for _ in range(chance.randrange(4))]
        cuts = sorted(chance.choices(range(len(text) + 1), k=chance.randrange(8)))
        pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
        wanted = text[: min((n for n in range(len(text)) if text.startswith(tuple(stop), n)), default=len(text))]
        assert "".join(until(iter(pieces), stop)) == wanted, (pieces, stop)


def test_a_text_is_given_as_soon_as_no_stop_string_can_begin_in_it():
    given = until(iter(["see ", "yo", "u", ". Us", "age", ". User", ": and"]), ["User:"])
    assert [piece for piece in given if piece] == ["see ", "yo", "u", ". ", "Usage", ". "]

    def endless():
        yield "one stop two"
        raise AssertionError("nothing is read after the stop")

    assert "".join(until(endless(), ["stop"])) == "one "
