"""State and its cells: what is held, and choosing among rows and going back."""

import pytest
import torch
from torch import Tensor

from qkv.context import Context
from qkv.errors import QkvError
from qkv.state import KV, Cross, Recurrent, State

G, K, S = 2, 3, 5


def source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=source(seed))


def state(rows: int = 3, room: int = 8) -> State:
    def empty(width: int) -> KV:
        return KV(torch.zeros(rows, G, room + 1, K), torch.zeros(rows, G, room + 1, width))

    mix = Recurrent(h=tensor(rows, 6), z=tensor(rows, 2, 2))
    return State([{"attn": empty(K)}, {"attn": empty(4), "mix": mix}], rows, room, torch.device("cpu"))


# --- what the state knows ---


def test_it_names_and_measures_all_that_it_holds():
    held = state()
    assert {name: tuple(t.shape) for name, t in held.tensors().items()} == {
        "0.attn.k": (3, G, 9, K), "0.attn.v": (3, G, 9, K), "1.attn.k": (3, G, 9, K), "1.attn.v": (3, G, 9, 4),
        "1.mix.h": (3, 6), "1.mix.z": (3, 2, 2),
    }  # fmt: skip
    assert held.bytes() == 4 * 3 * (3 * G * 9 * K + G * 9 * 4 + 6 + 4)
    assert len(list(held)) == 3


def test_lengths_and_positions_advance():
    held = state()
    assert held.positions(2).tolist() == [[0, 1]]
    held.advance(2)
    assert held.start == 2 and held.lengths.tolist() == [2, 2, 2] and held.positions(1).tolist() == [[2]]
    held.advance(3, torch.tensor([3, 0, 1]))
    assert held.start is None and held.lengths.tolist() == [5, 2, 3]
    assert held.positions(2).tolist() == [[5, 6], [2, 3], [3, 4]]
    held.advance(1)
    assert held.start is None and held.lengths.tolist() == [6, 3, 4]
    held.select(torch.tensor([2, 2]))
    assert held.lengths.tolist() == [4, 4]


def test_room_is_reserved_before_it_is_used():
    held = state(room=8)
    held.advance(6)
    held.reserve(2)
    with pytest.raises(QkvError, match="room for 8 tokens and 9 were fed; make it larger"):
        held.reserve(3)


def test_what_was_given_follows_its_row():
    held = state()
    held.given = {"memory_lengths": torch.tensor([4, 5, 6])}
    assert held.select(torch.tensor([2, 0, 0, 1])).given["memory_lengths"].tolist() == [6, 4, 4, 5]


def test_all_cells_choose_the_same_rows():
    held = state()
    for cell in held:
        if isinstance(cell, KV):
            cell.k.normal_(generator=source()), cell.v.normal_(generator=source())
    before, rows = {name: t.clone() for name, t in held.tensors().items()}, torch.tensor([2, 0, 2, 1])
    for name, value in held.select(rows).tensors().items():
        assert torch.equal(value, before[name][rows]), name


def test_going_back_counts_what_must_be_fed_again():
    held = state()
    held.advance(2)
    mark, before = held.mark(), held.tensors()["1.mix.h"].clone()
    held.advance(4, torch.tensor([4, 1, 2]))
    mix = held.cells[1]["mix"]
    mix.now = {"h": tensor(3, 6, seed=1), "z": tensor(3, 2, 2, seed=1)}
    assert held.rewind(mark, keep=3) == 3  # the recurrence went back to the mark itself
    assert held.start == 2 and held.lengths.tolist() == [2, 2, 2] and held.most == 2
    assert torch.equal(held.tensors()["1.mix.h"], before)
    del held.cells[1]["mix"]
    mark = held.mark()
    held.advance(4)
    assert held.rewind(mark, keep=3) == 0 and held.start == 5 and held.most == 5
    assert held.lengths.tolist() == [5, 5, 5]
    empty = State([{}], 2, 5, torch.device("cpu"))
    mark = empty.mark()
    empty.advance(4)
    assert empty.rewind(mark, keep=1) == 0 and empty.lengths.tolist() == [1, 1]


# --- keys and values ---


def write(cell: KV, held: State, T: int, lengths: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """One call as attention makes it → (new keys, all keys, their positions)."""
    context = Context(held.positions(T), start=held.start, lengths=lengths)
    k, view = tensor(3, G, T, K, seed=seed), cell.plan(context, T)
    keys, values = cell.write(k, k + 1, context, view)
    assert torch.equal(values, keys + 1) or lengths is not None or held.start is None
    held.advance(T, lengths)
    assert view.seen.shape[1] == keys.shape[2]
    return k, keys, view.seen


def test_rows_of_one_length_are_written_in_a_row():
    held = state()
    cell = held.cells[0]["attn"]
    first, keys, seen = write(cell, held, 3)
    assert torch.equal(keys, first) and seen.tolist() == [[0, 1, 2]]
    second, keys, seen = write(cell, held, 2, seed=1)
    assert torch.equal(keys, torch.cat((first, second), 2)) and seen.tolist() == [[0, 1, 2, 3, 4]]
    assert cell.room == 8


def test_ragged_rows_are_written_each_at_its_own_end():
    held = state()
    cell, lengths = held.cells[0]["attn"], torch.tensor([3, 1, 2])
    first, _, _ = write(cell, held, 3, lengths)
    second, keys, seen = write(cell, held, 2, seed=1)
    assert seen.tolist() == [list(range(8))]
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(keys[row, :, : n + 2], torch.cat((first[row, :, :n], second[row]), 1))


def test_padding_beyond_the_room_is_written_to_the_spare_slot():
    held = state()
    cell = held.cells[0]["attn"]
    write(cell, held, 6, torch.tensor([6, 2, 6]))
    before = cell.k.clone()
    new, _, _ = write(cell, held, 5, torch.tensor([2, 5, 0]), seed=1)
    assert torch.equal(cell.k[[0, 2], :, :6], before[[0, 2], :, :6])
    assert torch.equal(cell.k[0, :, 6:8], new[0, :, :2]) and torch.equal(cell.k[1, :, 2:7], new[1])


def test_a_slot_is_overwritten_when_its_position_comes_again():
    held = state()
    cell = held.cells[0]["attn"]
    first, _, _ = write(cell, held, 3)
    del held.cells[1]["mix"]
    mark = held.mark()
    write(cell, held, 4, seed=1)
    assert held.rewind(mark, keep=0) == 0
    again, keys, _ = write(cell, held, 2, seed=2)
    assert torch.equal(keys, torch.cat((first, again), 2))


# --- a memory ---


def memory(rows: int) -> Cross:
    return Cross(tensor(rows, G, S, K), tensor(rows, G, S, 4, seed=1))


def read(cell: Cross, rows: int) -> Tensor:
    """What each row reads."""
    assert len(cell.k) * cell.fold == rows and len(cell.v) == len(cell.k)
    return cell.k.repeat_interleave(cell.fold, 0)


@pytest.mark.parametrize(
    ("choices", "memories", "fold"),
    [
        ([[0, 0, 1, 1, 2, 2]], 3, 2),  # beams
        ([[0, 0, 1, 1, 2, 2], [1, 0, 3, 3, 4, 5]], 3, 2),  # choosing among the beams of each
        ([[0, 0, 1, 1, 2, 2], [2, 3, 4, 4]], 2, 2),  # a sentence is done
        ([[2, 0, 1]], 3, 1),  # another order
        ([[0, 0, 1, 1, 2, 2], [4, 5, 0, 1]], 2, 2),
        ([[0, 0, 1, 2]], 4, 1),  # not equally often: the memory is copied
        ([[0, 0, 1, 2], [0, 1, 2, 3]], 4, 1),
        ([[0, 1, 0, 1]], 4, 1),  # not beside each other
        ([[0, 0, 0, 1, 1, 1], [0, 3]], 2, 1),  # back to one path each
        ([[0, 0, 0, 1, 1, 1], [2]], 1, 1),
        ([[1, 1], [0, 1, 1, 0]], 1, 4),
    ],
    ids=str,
)
def test_rows_read_the_memory_of_the_row_that_they_come_from(choices, memories, fold):
    cell, expected = memory(3), memory(3).k
    for rows in choices:
        cell.select(torch.tensor(rows))
        expected = expected[torch.tensor(rows)]
        assert torch.equal(read(cell, len(rows)), expected)
    assert (len(cell.k), cell.fold) == (memories, fold)
    assert cell.tensors().keys() == {"k", "v"}


def test_any_choices_read_the_right_memory():
    draw = source(5)
    for _ in range(200):
        cell, expected = memory(4), memory(4).k
        for _ in range(5):
            rows = torch.randint(len(expected), (int(torch.randint(1, 9, (), generator=draw)),), generator=draw)
            if torch.rand((), generator=draw) < 0.5:
                rows = rows.sort().values.repeat_interleave(2)
            cell.select(rows)
            expected = expected[rows]
            assert torch.equal(read(cell, len(rows)), expected)


def test_choosing_among_beams_does_not_touch_the_memory():
    cell = memory(3)
    held = cell.k
    cell.select(torch.arange(3).repeat_interleave(4))
    cell.select(torch.tensor([3, 3, 3, 3, 4, 5, 6, 7, 11, 8, 8, 8]))
    assert cell.k is held and cell.fold == 4
    assert cell.rewind(cell.mark(), 3) == 0


def test_a_state_of_no_rows_can_be_chosen():
    held = State([{"cross": memory(3)}, {"mix": Recurrent(h=tensor(3, 2))}], 3, 5, torch.device("cpu"))
    held.select(torch.zeros(0, dtype=torch.long))
    assert all(len(t) == 0 for t in held.tensors().values())


def test_a_recurrence_comes_back_to_its_mark():
    cell = Recurrent(h=tensor(3, 4), z=tensor(3))
    mark = cell.mark()
    cell.now = {"h": tensor(3, 4, seed=1), "z": tensor(3, seed=1)}
    assert cell.rewind(mark, keep=5) == 5
    assert torch.equal(cell.tensors()["h"], tensor(3, 4)) and torch.equal(cell.tensors()["z"], tensor(3))
    cell.select(torch.tensor([2, 2]))
    assert torch.equal(cell.now["h"], tensor(3, 4)[[2, 2]]) and torch.equal(mark["h"], tensor(3, 4))


def test_a_mark_is_of_the_rows_that_stood_there() -> None:
    held = state()
    beginning = held.mark()
    held.advance(3)
    mark, same = held.mark(), held.fork()
    assert same.rewind(mark, 0) == 0 and same.lengths.tolist() == [3, 3, 3]
    assert held.select(torch.tensor([2, 0, 1])).rewind(beginning, 0) == 0  # where all rows are alike
    joined = same.fork().join(state())
    for other, old in ((held, mark), (same.fork(torch.tensor([0, 1, 2])), mark), (joined, mark), (joined, beginning)):
        with pytest.raises(QkvError, match="other rows stand in this state than when it was marked"):
            other.rewind(old, 0)
