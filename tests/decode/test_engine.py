"""Whatever arrives, in whatever order: each request is what `decode` gives for it alone."""

import random
import threading
import time
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.decode import (
    AtLeast,
    Batcher,
    Beam,
    ForceFirst,
    Greedy,
    Hypothesis,
    NoRepeat,
    RepetitionPenalty,
    Sample,
    Search,
    decode,
)
from qkv.errors import QkvError
from qkv.models import Module
from qkv.models.model import Model
from qkv.native import fast
from qkv.ops.blocks import quantise
from qkv.ops.blocks.packed import Packed
from qkv.parts.linear import Linear
from tests.contracts.specs import ROOM, VOCAB, decoders, pairs, rough

EVERY: dict[str, Model] = {**decoders(), **pairs()}
ALONE = ["mixer attention", "mixer mamba", "mixer mamba2", "window in every other layer", "mixtral-8x7b", "gemma-2-2b"]
SEARCHES: list[Search] = [
    Greedy(),
    Sample(temperature=1.5, seed=3),
    Sample(top_p=0.8, rules=(RepetitionPenalty(1.3),)),
    Beam(size=3, n_best=2),
    Beam(size=2, length_penalty=0.0, rules=(NoRepeat(2),)),
    Greedy(rules=(NoRepeat(2), AtLeast(3))),
]
END = 0
FEW = settings(max_examples=12, deadline=None)


def model(name: str, kind: str = "native") -> Module:
    return built(name, kind)


@cache
def built(name: str, kind: str) -> Module:
    made = rough(EVERY[name])
    return fast(made.float(), 1, say=lambda line: None) if kind != "torch" else made


@cache
def source(name: str, kind: str, length: int) -> dict[str, torch.Tensor]:
    """What a decoder reads, of a source of this length; nothing for a model that reads nothing."""
    made = model(name, kind)
    with torch.inference_mode():
        return made.encode(torch.tensor([ids(length, length)])) if hasattr(made, "encode") else {}


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB), k=length)


Ask = tuple[tuple[int, ...], int, int, int, int]
"""A prompt, the number of a search, a limit, a seed, and how long a source is."""


@cache
def alone(name: str, kind: str, ask: Ask) -> list[Hypothesis]:
    prompt, search, limit, seed, read = ask
    memory: Any = source(name, kind, read) or None
    how = SEARCHES[search]
    return decode(model(name, kind), [prompt], how, limits=[limit], ends=END, memory=memory, seeds=[seed])[0]


def begin(engine: Batcher, name: str, kind: str, ask: Ask) -> Any:
    prompt, search, limit, seed, read = ask
    memory: Any = source(name, kind, read) or None
    return engine.add(prompt, SEARCHES[search], limit=limit, ends={END}, seed=seed, memory=memory)


def same(found: list[Hypothesis], expected: list[Hypothesis], kind: str) -> None:
    if kind == "torch":
        assert [(h.ids, h.ended) for h in found] == [(h.ids, h.ended) for h in expected]
    else:
        assert found == expected


class Counting:
    """Counts the tokens that a model is fed, and the most rows at a time."""

    def __init__(self, model: Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fed, self.rows, inner = 0, 0, model.hidden

        def hidden(text: torch.Tensor, lengths: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
            self.fed += text.numel() if lengths is None else int(lengths.sum())
            self.rows = max(self.rows, len(text))
            return inner(text, lengths=lengths, **given)

        monkeypatch.setattr(model, "hidden", hidden)

    def take(self) -> int:
        fed, self.fed = self.fed, 0
        return fed


# --- each as if it were alone ---


def prompts(name: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Random ones, and ones that begin alike."""
    if name in pairs():
        return st.just((1,)) | st.tuples(st.just(1), st.integers(1, VOCAB - 1))
    alike = st.builds(
        lambda n, more: (*ids(14)[:n], *more), st.integers(1, 14), st.lists(st.integers(1, 5), max_size=4)
    )
    return alike.map(tuple) | st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=20).map(tuple)


def events(name: str) -> st.SearchStrategy[list[Any]]:
    """Requests that arrive, steps between them, and requests that are given up."""
    ask = st.tuples(
        prompts(name), st.integers(0, len(SEARCHES) - 1), st.integers(1, 12), st.integers(0, 3), st.integers(1, 6)
    )
    steps, cancelled = st.integers(1, 6), st.builds(lambda n: {"cancel": n}, st.integers(0, 9))
    return st.lists(ask | ask | ask | steps | steps | cancelled, min_size=8, max_size=24)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "native") for name in [*ALONE, "bart-base", "t5-small"]), ("mixer attention", "torch"),
     ("mixer mamba", "torch"), ("bart-base", "torch")],
)  # fmt: skip
def test_each_request_is_what_it_is_alone(name: str, kind: str) -> None:
    made = model(name, kind)

    @FEW
    @given(events(name), st.integers(3, 7), st.integers(1, 30), st.none() | st.integers(1, 4))
    def holds(events: list[Any], rows: int, chunk: int, share: int | None) -> None:
        whole = Batcher(made, rows=rows, chunk=chunk)
        most = whole.own + 3 * whole.empty.needs([ROOM], [6])
        engine = Batcher(made, rows=rows, chunk=chunk, memory=None if share is None else most * share)
        asked = []
        for event in events:
            if isinstance(event, tuple):
                asked.append((event, begin(engine, name, kind, event)))
            elif isinstance(event, dict) and asked:
                asked[event["cancel"] % len(asked)][1].cancel()
            elif isinstance(event, int):
                for _ in range(event):
                    engine.step()
                    assert engine.memory is None or engine.bytes() <= engine.memory
                    assert sum(job.rows for job in engine.running) + len(engine.reading) <= rows
        while engine.step():
            pass
        for ask, request in asked:
            expected, cancelled = alone(name, kind, ask), str(request.error) == "the request was cancelled"
            assert request.done
            if cancelled:
                assert SEARCHES[ask[1]].paths > 1 or request.tokens == expected[0].ids[: len(request.tokens)]
            else:
                same(request.result(), expected, kind)
                assert list(request) == expected[0].ids

    holds()


def test_quantised_weights_are_no_exception() -> None:
    made = rough(EVERY["smollm2-135m"]).float()
    for module in made.modules():
        if isinstance(module, Linear) and module.weight.shape[1] % 32 == 0:
            blocks = quantise("Q8_0", module.weight.detach())
            module.weight = torch.nn.Parameter(Packed("Q8_0", blocks.view(len(module.weight), -1)), requires_grad=False)
    fast(made, 1)
    engine, asks = Batcher(made, rows=5, chunk=6), [(ids(n, n), SEARCHES[n % 6], 3 + n) for n in range(1, 12)]
    asked = [engine.add(prompt, search, limit=limit, ends={END}) for prompt, search, limit in asks]
    for (prompt, search, limit), request in zip(asks, asked, strict=True):
        assert request.result() == decode(made, [prompt], search, limits=[limit], ends=END)[0]


# --- texts that begin alike ---


@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba"])
def test_what_is_known_is_not_read_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(name)
    count, engine, base, recurrent = Counting(made, monkeypatch), Batcher(made), ids(14), name == "mixer mamba"

    def cost(prompt: list[int], limit: int = 1) -> int:
        count.take()
        found = engine.add(prompt, Greedy(), limit=limit).result()
        fed = count.take()
        assert found == decode(made, [prompt], Greedy(), limits=[limit], ends=None)[0]
        count.take()
        return fed

    assert cost(base) == 14
    assert cost([*base, 1, 2]) == 2
    assert cost([*base[:9], 7, 8]) == (11 if recurrent else 2)  # a recurrence serves as a whole, or not at all
    assert cost(base) == (14 if recurrent else 1)  # for what comes next it must be fed a token
    engine.kept.clear()
    said = engine.add(base, Greedy(), limit=6).result()[0].ids
    assert cost([*base, *said, 3]) == 2  # a chat goes on: the last token said was not fed, nor what is new
    assert len(engine.kept) == (3 if recurrent else 1)


def test_requests_that_arrive_together_read_their_common_beginning_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, base = model("mixer attention"), ids(20)
    count, engine = Counting(made, monkeypatch), Batcher(made, rows=8, chunk=64)
    for n in range(1, 7):
        engine.add([*base, n, n], Greedy(), limit=1)
    engine.add(ids(5, 9), Greedy(), limit=1)
    while engine.step():
        pass
    assert count.take() == 20 + 6 * 2 + 5


def test_only_so_many_texts_are_kept() -> None:
    engine = Batcher(model("mixer attention"), rows=3)
    for n in range(6):
        engine.add([n + 1, 2, 3], Greedy(), limit=2).result()
    assert [text[0] for text in engine.kept] == [4, 5, 6]
    engine.add([4, 2, 5], Greedy(), limit=2).result()
    assert [text[:3] for text in engine.kept] == [(6, 2, 3), (4, 2, 3), (4, 2, 5)]


# --- the bounds ---


@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba", "t5-small"])
def test_memory_is_never_exceeded(name: str) -> None:
    """Natively, where pages are never given back, not even for a moment."""
    made = fast(rough(EVERY[name]).float(), 1)
    program = made.wiring.program
    assert program is not None
    page, chance = program.pages.size, random.Random(0)
    memory = Batcher(made).own + 2 * Batcher(made).empty.needs([ROOM], [6]) + 2 * page
    engine, asked = Batcher(made, rows=9, chunk=16, memory=memory), []
    kept = 0
    while len(asked) < 40 or engine.pending:
        if len(asked) < 40 and chance.random() < 0.7:
            ask = (
                tuple(ids(chance.randint(1, 20), chance.randint(0, 3))),
                chance.choice((0, 1)),
                chance.randint(1, 9),
                0,
                6,
            )
            asked.append((ask, begin_with(engine, made, ask)))
        engine.step()
        kept += bool(engine.kept)
        used = sum(len(page) for pool in pools(program) for page in pool.memory)
        assert max(used, engine.bytes()) <= memory
    assert kept or name == "t5-small"
    assert all(request.result() for _, request in asked)


def begin_with(engine: Batcher, made: Module, ask: Ask) -> Any:
    with torch.inference_mode():
        memory: Any = made.encode(torch.tensor([ids(ask[4])])) if hasattr(made, "encode") else None
    return engine.add(ask[0], SEARCHES[ask[1]], limit=ask[2], seed=ask[3], memory=memory)


def pools(program: Any) -> list[Any]:
    return [program.pages, *([] if program.memories is None else [program.memories.pages])]


def test_requests_begin_in_the_order_in_which_they_came() -> None:
    made = model("mixer attention")
    engine = Batcher(made, rows=3, chunk=4)
    asks = [(6, Greedy()), (2, Beam(size=3)), (1, Greedy()), (1, Greedy()), (1, Beam(size=2))]
    asked = [engine.add(ids(n, n), search, limit=3) for n, search in asks]
    begun: list[int] = []
    while engine.step():
        at_work = [job.request for job in (*engine.reading, *engine.running)]
        begun += [n for n, request in enumerate(asked) if (request in at_work or request.done) and n not in begun]
    assert begun == [0, 1, 2, 3, 4]  # though there was a row for the third while the second waited for three


def test_what_could_never_be_served_is_refused_at_once() -> None:
    learned = Batcher(model("embedding learned"), rows=2)
    with pytest.raises(QkvError, match="30 tokens and 12 new ones are too many for a model of 40 positions"):
        learned.add(ids(30), Greedy(), limit=12)
    assert len(learned.add(ids(30), Greedy(), limit=11).result()[0].ids) == 11
    with pytest.raises(QkvError, match="a search of 3 paths needs as many rows, and the engine has 2"):
        learned.add([1], Beam(size=3), limit=2)
    small = Batcher(model("embedding learned", "torch"), memory=10_000)
    with pytest.raises(QkvError, match="20 tokens and 9 new ones take 23808 bytes, and the engine has 10000"):
        small.add(ids(20), Greedy(), limit=9)
    for prompt, limit, line in (([], 1, "found 0 and 1"), ([1], 0, "found 1 and 0"), ([VOCAB], 1, "lie between 0 and")):
        with pytest.raises(QkvError, match=line):
            learned.add(prompt, Greedy(), limit=limit)
    memory: Any = source("bart-base", "native", 3)
    with pytest.raises(QkvError, match="this model reads none"):
        learned.add([1], Greedy(), limit=1, memory=memory)
    with pytest.raises(QkvError, match="needs memory=model.encode"):
        Batcher(model("bart-base")).add([1], Greedy(), limit=1)
    for shape in ((2, 3, 16), (1, 3, 20), (3, 16)):
        with pytest.raises(QkvError, match=r"the memory of one text, \(1, tokens, 16\), not "):
            Batcher(model("bart-base")).add([1], Greedy(), limit=1, memory={"memory": torch.zeros(shape)})
    assert not learned.pending


# --- what goes wrong ---


def test_a_request_that_fails_fails_alone() -> None:
    made = model("mixer attention")
    engine = Batcher(made)
    well = engine.add(ids(5), Greedy(), limit=8)
    bad = engine.add(ids(4, 1), Greedy(rules=(ForceFirst(VOCAB),)), limit=8)
    with pytest.raises(QkvError, match="is to be forced"):
        list(bad)
    with pytest.raises(QkvError, match="is to be forced"):
        bad.result()
    assert well.result() == decode(made, [ids(5)], Greedy(), limits=[8], ends=None)[0]


def test_a_request_that_cannot_begin_fails_alone_and_its_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("mixer attention")
    engine = Batcher(made)
    begin = made.new_state
    monkeypatch.setattr(made, "new_state", lambda batch, room: begin(batch, room) if room != 7 else 1 / 0)
    first, bad, last = (engine.add(ids(4, n), Greedy(), limit=limit) for n, limit in enumerate((9, 4, 6)))
    served = threading.Thread(target=engine.run)
    served.start()
    with pytest.raises(QkvError, match="ZeroDivisionError"):
        bad.result()
    for n, request, limit in ((0, first, 9), (2, last, 6)):
        assert request.result() == decode(made, [ids(4, n)], Greedy(), limits=[limit], ends=None)[0]
    monkeypatch.setattr(made, "hidden", lambda *_, **__: 1 / 0)
    with pytest.raises(QkvError, match="ZeroDivisionError"):
        engine.add(ids(5), Greedy(), limit=3).result()
    monkeypatch.undo()
    well = engine.add(ids(5), Greedy(), limit=3)  # nobody steps it but the thread
    while not well.done:
        time.sleep(0.001)
    engine.close()
    served.join()
    assert well.result() == decode(made, [ids(5)], Greedy(), limits=[3], ends=None)[0]


def test_what_always_fails_is_not_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Batcher(model("mixer attention"))
    monkeypatch.setattr(engine, "admit", lambda: 1 / 0)
    for request in [engine.add(ids(3), Greedy(), limit=2) for _ in range(2)]:
        with pytest.raises(QkvError, match="ZeroDivisionError"):
            request.result()
    assert not engine.pending


def test_a_step_that_fails_leaves_an_engine_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model("mixer mamba2")
    engine = Batcher(made, chunk=3)
    running, reading = engine.add(ids(3), Greedy(), limit=8), engine.add(ids(9, 1), Greedy(), limit=2)
    for _ in range(2):
        engine.step()
    waiting = engine.add(ids(4, 2), Greedy(), limit=3)
    with monkeypatch.context() as broken:
        broken.setattr(made, "hidden", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    for request in (running, reading):
        with pytest.raises(QkvError, match="the step of this request failed: ZeroDivisionError"):
            request.result()
    assert waiting.result() == decode(made, [ids(4, 2)], Greedy(), limits=[3], ends=None)[0]


def test_a_request_that_is_given_up_ends_and_leaves_its_room() -> None:
    engine = Batcher(model("mixer attention"), rows=1)
    first, second = engine.add(ids(3), Greedy(), limit=30), engine.add(ids(4), Greedy(), limit=3)
    given = []
    with pytest.raises(QkvError, match="the request was cancelled"):
        for token in first:
            given.append(token)
            if len(given) == 4:
                first.cancel()
    assert given == first.tokens and len(given) == 4
    assert len(second.result()[0].ids) == 3
    second.cancel()  # too late
    assert second.result() and not engine.step()


# --- threads ---


def test_any_thread_may_add_while_one_steps() -> None:
    made, name = model("grouped queries, parallel"), "grouped queries, parallel"
    engine, found = Batcher(made, rows=4, chunk=8), dict[Ask, Any]()
    server = threading.Thread(target=engine.run)
    server.start()

    def client(seed: int) -> None:
        chance = random.Random(seed)
        for n in range(4):
            ask = tuple(ids(chance.randint(1, 15), chance.randint(0, 2))), chance.randrange(6), 6, 10 * seed + n, 1
            request = begin(engine, name, "native", ask)
            found[ask] = list(request), request.result()
            begin(engine, name, "native", ask).cancel()

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    last = engine.add(ids(4), Greedy(), limit=30)
    engine.close()
    server.join(60)
    assert not server.is_alive() and len(found) == 16
    with pytest.raises(QkvError, match="cancelled"):
        last.result()
    with pytest.raises(QkvError, match="the engine is closed"):
        engine.add([1], Greedy(), limit=1)
    assert not engine.pending and engine.bytes() == engine.own
    for ask, (tokens, hypotheses) in found.items():
        assert hypotheses == alone(name, "native", ask) and tokens == hypotheses[0].ids


def test_those_that_wait_step_in_turn() -> None:
    """No thread is set aside: whoever reads, steps, for all."""
    made = model("mixer attention")
    engine, found = Batcher(made, rows=3), dict[int, list[int]]()

    def client(n: int) -> None:
        found[n] = list(engine.add(ids(n + 1, n), Greedy(), limit=4 + n))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(60)
    for n in range(6):
        assert found[n] == decode(made, [ids(n + 1, n)], Greedy(), limits=[4 + n], ends=None)[0][0].ids
