"""Rows that leave a state for one of their own, and rows that come together, against each row alone."""

from functools import cache

import pytest
import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.models import Module
from qkv.models.model import Model
from qkv.native import fast
from qkv.native.cache import Paged, Pages, Read
from qkv.native.library import PAGE, Engine
from qkv.state import Cross, State
from tests.contracts.specs import VOCAB, decoders, pairs, rough

EVERY: dict[str, Model] = {**decoders(), **pairs()}
KINDS = pytest.mark.parametrize("kind", ["torch", "native"])
ROOM = 30


@cache
def model(name: str, kind: str) -> Module:
    if kind == "torch":
        return rough(EVERY[name])
    made = fast(rough(EVERY[name]).float(), 1, say=lambda line: None)
    return made if made.programs else made.double()  # what has no kernel stays with torch


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def memories(model: Module, sizes: list[int], seed: int = 0) -> dict[str, Tensor]:
    """What the rows of a batch read; nothing where a model reads nothing."""
    if not hasattr(model, "encode"):
        return {}
    return model.encode(ids(len(sizes), max(sizes), seed), lengths=torch.tensor(sizes))


class Row:
    """A row that is fed by itself: what the same row says in any company."""

    def __init__(self, model: Module, given: dict[str, Tensor], n: int) -> None:
        self.model, size = model, int(given["memory_lengths"][n]) if given else 0
        own = {"memory": given["memory"][n : n + 1, :size], "memory_lengths": torch.tensor([size])} if given else {}
        self.given, self.ids = own, torch.zeros(1, 0, dtype=torch.long)

    def feed(self, more: Tensor) -> Tensor:
        """T ids → logits T V, from an empty state."""
        self.ids = torch.cat((self.ids, more[None]), 1)
        state = self.model.new_state(1, ROOM, **self.given)
        return self.model(self.ids, state=state)[0, -len(more) :]

    def copy(self) -> "Row":
        made = Row(self.model, {}, 0)
        made.given, made.ids = self.given, self.ids
        return made


def check(model: Module, state: State, rows: list[Row], lengths: list[int], seed: int) -> None:
    """Feed so many tokens to each row of a state, and to each row alone."""
    T = max(lengths)
    new = ids(len(rows), T, seed)
    logits = model(new, state=state, lengths=None if min(lengths) == T else torch.tensor(lengths))
    for row, found, some, n in zip(rows, logits, new, lengths, strict=True):
        if not n:
            continue
        expected = row.feed(some[:n])
        if model.programs:
            assert torch.equal(found[:n], expected)
        else:
            assert (found[:n] - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max()))


@torch.inference_mode()
@KINDS
@pytest.mark.parametrize("name", EVERY)
def test_rows_that_join_and_fork_go_on_as_if_alone(name: str, kind: str) -> None:
    made = model(name, kind)
    first, second = memories(made, [3, 5]), memories(made, [7], seed=1)
    a, b = made.new_state(2, ROOM, **first), made.new_state(1, ROOM, **second)
    rows, other = [Row(made, first, 0), Row(made, first, 1)], Row(made, second, 0)
    check(made, a, rows, [6, 6], 1)
    check(made, b, [other], [3], 2)
    left = a.fork()
    fork, forked = a.fork(torch.tensor([1, 0, 1, 0])), [rows[n].copy() for n in (1, 0, 1, 0)]
    copies = [row.copy() for row in rows]
    a.join(b)
    rows.append(other.copy())
    check(made, a, rows, [2, 1, 3], 3)
    check(made, fork, forked, [1, 1, 1, 1], 4)
    check(made, a, rows, [1, 1, 1], 5)
    fork = fork.fork(torch.tensor([3, 2]), room=12)
    forked = [forked[3], forked[2]]
    check(made, fork, forked, [2, 0], 6)
    check(made, b, [other], [2], 7)  # which has joined, and is what it was
    check(made, left, copies, [1, 1], 8)
    fork = fork.fork(room=ROOM).join(a)
    check(made, fork, forked + rows, [1, 2, 1, 1, 2], 9)
    fork.select(torch.tensor([4, 4, 1]))
    check(made, fork, [rows[2].copy(), rows[2], forked[1]], [1, 1, 2], 10)


@torch.inference_mode()
@KINDS
@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba", "window in every other layer"])
def test_a_fork_goes_back_and_what_it_came_from_does_not(name: str, kind: str) -> None:
    made = model(name, kind)
    beginning, state, row = made.new_state(1, 1).mark(), made.new_state(1, ROOM), Row(made, {}, 0)
    check(made, state, [row], [20], 1)
    fork, early = state.fork(room=14), Row(made, {}, 0)
    kept = 10 - fork.rewind(beginning, 10)
    early.ids = row.ids[:, :kept]
    assert kept == (0 if "mamba" in name else 10)
    check(made, fork, [early], [4], 2)
    check(made, state, [row], [3], 3)


@torch.inference_mode()
@KINDS
@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba2", "grouped queries, parallel", *pairs()])
def test_what_is_needed_is_what_full_rows_take(name: str, kind: str) -> None:
    made = model(name, kind)
    given = memories(made, [35, 35, 35])
    state = made.new_state(3, ROOM, **given)
    check(made, state, [Row(made, given, n) for n in range(3)], [ROOM] * 3, 0)
    expected = made.new_state(1, 1, **memories(made, [1])).needs([ROOM] * 3, [35] * 3 if given else [])
    assert state.bytes() == expected > 0


# --- cells ---


def memory(rows: int, size: int, seed: int) -> Cross:
    draw = torch.Generator().manual_seed(seed)
    return Cross(torch.randn(rows, 2, size, 3, generator=draw), torch.randn(rows, 2, size, 4, generator=draw))


@pytest.mark.parametrize(("left", "right", "fold"), [(2, 2, 2), (4, 2, 2), (3, 2, 1), (1, 4, 1), (6, 4, 2)])
def test_memories_join_whatever_number_of_rows_reads_them(left: int, right: int, fold: int) -> None:
    a, b = memory(2, 5, 0), memory(3, 3, 1)
    k = [*(x for x in a.k for _ in range(left)), *(x for x in b.k for _ in range(right))]
    a.select(torch.arange(2).repeat_interleave(left))
    b.select(torch.arange(3).repeat_interleave(right))
    shared = a.fork(None, ROOM)
    assert shared.k.data_ptr() == a.k.data_ptr() and shared.fold == left
    a.join(b)
    assert a.fold == fold and a.size == 5
    for found, expected in zip(a.k.repeat_interleave(fold, 0), k, strict=True):
        assert torch.equal(found[:, : expected.shape[1]], expected) and not found[:, expected.shape[1] :].any()
    a.select(torch.arange(2 * left, 2 * left + 3 * right))  # those with long memories are gone, and their padding
    assert a.size == 3 and torch.equal(a.k, b.k.repeat_interleave(right // fold, 0))


@torch.inference_mode()
def test_states_that_do_not_fit_are_not_joined() -> None:
    made, native = model("bart-base", "torch"), model("bart-base", "native")
    given = memories(made, [3])
    state = made.new_state(1, ROOM, **given)
    with pytest.raises(QkvError, match=r"found room for 30 and 31 tokens, .*: fork\(room=…\)"):
        state.join(made.new_state(1, ROOM + 1, **given))
    with pytest.raises(QkvError, match="given tensors alike"):
        state.join(made.new_state(1, ROOM, memory=given["memory"]))
    with pytest.raises(QkvError, match="states of different passes"):
        state.join(native.new_state(1, ROOM, **memories(native, [3])))
    short, long = (made.new_state(1, ROOM, memory=torch.zeros(1, size, 16).double()) for size in (2, 3))
    with pytest.raises(QkvError, match="memories of unequal length are joined where their lengths were given"):
        short.join(long)


def test_pages_are_copied_when_one_of_those_that_share_them_writes() -> None:
    pages = Pages(Engine(1), 16)
    text = Paged(pages, 1)
    text.reserve(*(torch.tensor([n]).numpy() for n in (0, 2 * PAGE + 3)))
    fork = text.fork(None, 2 * PAGE + 10)
    assert sorted(pages.held[pages.held > 0]) == [2, 2, 2]
    fork.reserve(*(torch.tensor([n]).numpy() for n in (2 * PAGE + 3, 2 * PAGE + 4)))
    assert sorted(pages.held[pages.held > 0]) == [1, 1, 2, 2]
    short = text.fork(torch.tensor([0, 0]), PAGE + 1)
    assert short.counts.tolist() == [2, 2]
    short.join(fork)
    del fork, text
    pages.settle()
    assert sorted(pages.held[pages.held > 0]) == [1, 3, 3]
    del short
    pages.settle()
    assert not pages.held.any() and len(set(pages.free)) == len(pages.free) == len(pages.memory)


def test_a_memory_that_is_read_no_longer_is_let_go() -> None:
    pages = Pages(Engine(1), 16)
    paged, lengths = Paged(pages, 3), torch.tensor([5, 6, 7], dtype=torch.int32).numpy()
    paged.reserve(0 * lengths, lengths)
    cell = Read(paged, lengths)
    del paged
    cell.select(torch.tensor([0, 0, 2, 2]))
    assert cell.of.tolist() == [0, 0, 1, 1] and cell.lengths.tolist() == [5, 7] and pages.held.sum() == 2
    fork = cell.fork(torch.tensor([3]), ROOM)
    assert fork.lengths.tolist() == [7] and pages.held.sum() == 3
    fork.join(cell)
    assert fork.of.tolist() == [0, 1, 1, 2, 2] and fork.lengths.tolist() == [7, 5, 7]
    del cell, fork
    pages.settle()
    assert not pages.held.any()
