"""Pages: shared, copied when written, given back, and no more of them than texts need."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from qkv.decode import Beam, decode
from qkv.models import EncoderDecoder
from qkv.native import fast
from qkv.native.cache import Held, Paged, Pages
from qkv.native.library import PAGE, Engine, lanes
from qkv.native.program import Pass
from tests.contracts.specs import VOCAB, decoders, pairs, rough

LENGTHS = torch.tensor([130, 3, 64])


def filled(pages: Pages, *lengths: int) -> Paged:
    cell = Paged(pages, len(lengths))
    cell.reserve(np.zeros(len(lengths), int), np.array(lengths))
    for row, count in enumerate(cell.counts):
        for n in range(count):
            pages.memory[cell.table[row, n]].fill_(10 * row + n)
    return cell


def whole(width: int) -> int:
    """So many numbers in whole vectors."""
    return -(-width // lanes()) * lanes()


def content(cell: Paged) -> list[list[int]]:
    """What stands in the pages of each text."""
    return [
        [int(cell.pages.memory[page][0]) for page in row[:count]]
        for row, count in zip(cell.table, cell.counts, strict=True)
    ]


def held(pages: Pages) -> int:
    pages.settle()
    assert sorted(pages.free) == np.flatnonzero(pages.held == 0).tolist()
    return int((pages.held > 0).sum())


def test_texts_have_as_many_pages_as_they_fill() -> None:
    pages = Pages(Engine(1), 16)
    cell = filled(pages, 0, 1, PAGE, PAGE + 1, 9 * PAGE)
    assert cell.counts.tolist() == [0, 1, 1, 2, 9] and held(pages) == 13
    seen = cell.seen(lengths := np.array([0, 1, 64, 65, 576], np.int32))
    assert (seen.stride, seen.lengths) == (cell.table.shape[1], lengths.ctypes.data) and cell.table.shape[1] >= 9
    used = [page for row, count in zip(cell.table, cell.counts, strict=True) for page in row[:count]]
    assert len(set(used)) == 13
    assert [pages.address[page] for page in used] == [pages.memory[page].data_ptr() for page in used]
    cell.reserve(np.array([0, 1, 64, 65, 576]), np.array([0, 64, 64, 70, 577]))
    assert cell.counts.tolist() == [0, 1, 1, 2, 10]


def test_a_shared_page_is_copied_when_it_is_written() -> None:
    pages = Pages(Engine(1), 16)
    cell = filled(pages, 2 * PAGE + 5, 7)
    cell.select(torch.tensor([0, 0, 1, 0]))
    assert held(pages) == 4 and content(cell) == [[0, 1, 2], [0, 1, 2], [10], [0, 1, 2]]
    starts, before = np.array([133, 133, 7, 133]), cell.table.copy()
    cell.reserve(starts, starts + np.array([1, 1, 1, 0]))  # the last one writes nothing, and keeps the page it shares
    assert (cell.table[:, :2] == before[:, :2]).all() and len({int(page) for page in cell.table[[0, 1, 3], 2]}) == 3
    assert content(cell) == [[0, 1, 2], [0, 1, 2], [10], [0, 1, 2]] and held(pages) == 6
    pages.memory[cell.table[0, 2]].fill_(99)
    assert content(cell) == [[0, 1, 99], [0, 1, 2], [10], [0, 1, 2]]
    cell.reserve(np.array([60, 133, 7, 133]), np.array([61, 133, 7, 133]))  # back to a page that all three share
    assert pages.held[cell.table[0, 0]] == 1 and pages.held[cell.table[1, 0]] == 2
    cell.select(torch.tensor([2]))
    assert held(pages) == 1 and content(cell) == [[10]]
    cell.select(torch.tensor([], dtype=torch.long))
    assert held(pages) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_of_each_head_only_what_is_filled_is_copied(threads: int) -> None:
    """In vectors of positions: what stands behind them is written before it is read."""
    heads, position = 3, 4  # bytes of a position
    pages = Pages(Engine(threads), heads * PAGE * position, PAGE * position)
    cell = filled(pages, 5, PAGE + lanes() + 1)
    cell.select(torch.tensor([0, 0, 1, 1]))
    starts = np.array([5, 5, PAGE + lanes() + 1, PAGE + lanes() + 1])
    cell.reserve(starts, starts + 1)
    for row, n, number, whole in ((0, 0, 0, lanes()), (2, 1, 11, 2 * lanes())):
        copied = pages.memory[cell.table[row, n]].view(heads, PAGE, position)
        assert (copied[:, :whole] == number).all() and not copied[:, whole:].any()


def test_pages_are_free_when_nobody_holds_them_and_are_used_again() -> None:
    pages = Pages(Engine(1), 16)
    first, second = filled(pages, 3 * PAGE), filled(pages, PAGE, PAGE)
    second.select(torch.tensor([1, 1, 0]))
    assert held(pages) == 5
    del first
    gc.collect()
    assert held(pages) == 2
    third = filled(pages, 3 * PAGE)
    assert held(pages) == 5 and sum(len(page) > 0 for page in pages.memory) == 5
    del second, third
    gc.collect()
    assert held(pages) == 0


def test_memory_that_is_no_longer_needed_goes_back() -> None:
    pages = Pages(Engine(1), 16)

    def kept() -> int:
        return sum(len(memory) > 0 for memory in pages.memory)

    many = filled(pages, 40 * PAGE)
    few = filled(pages, 3 * PAGE)
    del many
    assert held(pages) == 3 and kept() == 43  # the next may be as large
    for left in (21, 10, 5, 3):
        del few
        few = filled(pages, 3 * PAGE)
        assert held(pages) == 3 and kept() == left
    assert content(few) == [[0, 1, 2]]


def test_threads_may_share_a_pool() -> None:
    pages, starts, ends = Pages(Engine(1), 16), np.zeros(20, int), np.full(20, 2 * PAGE)

    def work(_: int) -> None:
        for _ in range(50):
            cell = Paged(pages, 20)
            cell.reserve(starts, ends)
            mine = cell.table[:, :2]
            assert len(np.unique(mine)) == 40 and (pages.held[mine] == 1).all()
            cell.select(torch.arange(0, 20, 2))

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)
    gc.collect()
    assert held(pages) == 0


def test_a_recurrence_goes_back_to_its_mark() -> None:
    cell = Held(3, 64)
    cell.now[:] = torch.arange(3, dtype=torch.uint8)[:, None]
    mark = cell.mark()
    cell.now[1] = 9
    assert cell.rewind(mark, 4) == 4 and cell.now[:, 0].tolist() == [0, 1, 2]
    cell.now[1] = 9
    assert cell.rewind(mark, 0) == 0 and cell.now[:, 0].tolist() == [0, 1, 2]
    cell.select(torch.tensor([2, 2, 0]))
    (states,) = cell.fields().values()
    assert cell.now[:, 0].tolist() == [2, 2, 0] and np.diff(states).tolist() == [64, 64]


# --- those of a model ---


def programs(name: str) -> tuple[torch.nn.Module, list[Pages]]:
    model = fast(rough({**decoders(), **pairs()}[name]).float())
    found = [one for one in model.programs.values() if isinstance(one, Pass)]
    return model, [one.pages for one in found] + [one.memories.pages for one in found if one.memories is not None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["smollm2-135m", "mixtral-8x7b", "t5-small", "position alibi"])
def test_all_pages_are_free_when_states_die(name: str) -> None:
    model, every = programs(name)
    ids = torch.randint(VOCAB, (3, 130), generator=torch.Generator().manual_seed(1))
    pair = isinstance(model.spec, EncoderDecoder)
    memory = model.encode(ids[:, :70]) if pair else {}
    model(ids, **memory)
    assert [held(pages) for pages in every] == [0] * len(every)
    state = model.new_state(3, 200, **memory)
    model(ids, lengths=LENGTHS, state=state)
    last = every[1] if pair else every[0]
    assert held(last) == 3 + 1 + 1
    state.select(torch.tensor([0, 0, 0, 1, 2]))
    assert held(last) == 5
    model(ids[[0, 1, 2, 0, 1], :1], state=state)
    assert held(last) == 3 + 2 + 1 + 2  # two of three copied what they share, and the text of 64 began a page
    model(ids[[0, 1, 2, 0, 1], 1:2], state=state)
    assert held(last) == 8
    if pair:
        assert held(every[-1]) == 3 * 2
    del state
    gc.collect()
    assert [held(pages) for pages in every] == [0] * len(every)
    decode(
        model, [[1, 2, 3], [4]], Beam(4), limits=[70, 30], ends=None, memory=model.encode(ids[:2, :5]) if pair else None
    )
    gc.collect()
    assert [held(pages) for pages in every] == [0] * len(every)


@torch.no_grad()
def test_memory_is_bounded_by_what_texts_fill() -> None:
    """A state takes no more than its texts, whatever room it has; and a page that was given back is taken first."""
    model, (pages,) = programs("smollm2-135m")
    ids = torch.randint(VOCAB, (4, 100), generator=torch.Generator().manual_seed(1))
    for _ in range(5):
        state = model.new_state(4, 4000)
        model(ids, state=state)
        assert state.bytes() == 8 * pages.size
        one = model.programs["stack"].build
        layers, groups, width = 2, 2, model.stack.layer(0).attn.f.head_width
        assert pages.size == one.page == layers * groups * PAGE * (width + whole(width)) * 4
    assert sum(len(page) > 0 for page in pages.memory) <= 16  # the new state is made before the old one dies
    for n in range(1, 40):  # a beam that is chosen from again and again
        state.select(torch.tensor([n % 4, 0, 0, 3]))
        model(ids[:, :1], state=state)
    assert held(pages) <= 4 * (-(-139 // PAGE)) and len(state.tensors()) == held(pages)


@torch.no_grad()
def test_an_encoder_keeps_one_layers_keys() -> None:
    """All its layers share one place, and texts are read so many at a time."""
    model, (pages, *_) = programs("t5-small")
    model.encode(torch.zeros(40, 60, dtype=torch.long))
    body = model.encoder.layer(0).attn.f
    assert pages.size == body.groups * PAGE * (body.head_width + whole(body.head_width)) * 4
    assert sum(len(page) > 0 for page in pages.memory) <= 8
