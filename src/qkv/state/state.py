"""The state of a batch of rows: lengths once for all layers, and a cell for each branch of each executed layer."""

import dataclasses as dc
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.state.cross import Cross


class Cell(Protocol):
    """What one branch remembers; it owns its tensors, and `State` owns every fact about length."""

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""

    def fork(self, rows: Tensor | None, room: int) -> "Cell":
        """A cell of its own with these rows (None: all) and room for so many tokens, which shares what it can."""

    def join(self, other: Any) -> None:
        """Add the rows of another cell of its kind and room behind its own; the other stays as it is."""

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        """The bytes that rows take at most, which grow to so many tokens and read memories of so many."""

    def mark(self) -> Any:
        """What `rewind` needs to come back to this moment."""

    def rewind(self, mark: Any, keep: int) -> int:
        """Go back to `keep` tokens after the mark → how many of those must be fed again."""


@dc.dataclass(frozen=True, eq=False, slots=True)
class Mark:
    """A moment of a state that it can come back to."""

    start: int | None
    most: int
    lengths: Tensor
    cells: list[Any]
    rows: object


class State:
    """Owned by the caller, advanced once per forward by the wiring.

    `cells[n][branch]` is indexed by execution position, not by module, so that shared layers and concurrent requests
    each have their own. `given` are the tensors of the wiring that every later call needs (the memory's lengths).
    """

    def __init__(self, cells: list[dict[str, Cell]], batch: int, room: int, device: torch.device) -> None:
        self.cells, self.room = cells, room
        self.given: dict[str, Tensor] = {}
        self.owner: Any = None
        """The program whose cells these are; None is torch."""
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.start: int | None = 0
        self.rows = object()
        """Another one when other rows stand here: what was marked before has no meaning for them."""
        self.most = 0
        """No row is longer than this: a bound that needs no look at `lengths`."""

    def __iter__(self) -> Iterator[Cell]:
        return (cell for layer in self.cells for cell in layer.values())

    def positions(self, T: int) -> Tensor:
        """The positions of the next T tokens: 1 T where all rows are equally long, else B T."""
        steps = torch.arange(T, device=self.lengths.device)
        return (steps + self.start)[None] if self.start is not None else self.lengths[:, None] + steps

    def reserve(self, T: int) -> None:
        """Refuse more tokens than there is room for."""
        if self.most + T > self.room:
            raise QkvError(f"the state has room for {self.room} tokens and {self.most + T} were fed; make it larger")

    def advance(self, T: int, lengths: Tensor | None = None) -> None:
        """T more tokens were fed, of which row b's first lengths[b] are real."""
        self.lengths = self.lengths + (T if lengths is None else lengths)
        self.start = self.start + T if lengths is None and self.start is not None else None
        self.most = self.most + T if lengths is None else int(self.lengths.max()) if len(lengths) else 0

    def select(self, rows: Tensor) -> Self:
        """Keep these rows, in this order; a row may be taken several times (beams)."""
        self.lengths, self.rows = self.lengths[rows], object()
        self.given = {name: value[rows] for name, value in self.given.items()}
        for cell in self:
            cell.select(rows)
        if self.start is None and len(rows):
            self.most = int(self.lengths.max())
        return self

    def fork(self, rows: Tensor | None = None, room: int | None = None) -> "State":
        """A state of its own with these rows, which shares what it can; by default all of them, and the same room.

        Of a row that is longer than its new room only the beginning is there: `rewind` goes back to it.
        """
        room = self.room if room is None else room
        cells = [{branch: cell.fork(rows, room) for branch, cell in layer.items()} for layer in self.cells]
        chosen = slice(None) if rows is None else rows
        made = State(cells, 0, room, self.lengths.device)
        made.owner, made.start, made.most, made.lengths = self.owner, self.start, self.most, self.lengths[chosen]
        made.given = {name: value[chosen] for name, value in self.given.items()}
        made.rows = self.rows if rows is None else made.rows
        if made.start is None and len(made.lengths):
            made.most = int(made.lengths.max())
        return made

    def join(self, other: "State") -> Self:
        """Add the rows of another state of the same model and room behind its own; the other stays as it is."""
        if self.owner is not other.owner:
            raise QkvError("states of different passes are not joined: make both with one model's new_state")
        if self.room != other.room or self.given.keys() != other.given.keys():
            raise QkvError(
                "states that are joined have one room and were given tensors alike; found room for "
                f"{self.room} and {other.room} tokens, {sorted(self.given)} and {sorted(other.given)}: fork(room=…)"
            )
        pairs: list[tuple[Any, Any]] = list(zip(self, other, strict=True))
        if not self.given and any(isinstance(a, Cross) and a.size != b.size for a, b in pairs):
            raise QkvError("memories of unequal length are joined where their lengths were given: memory_lengths=…")
        for cell, behind in pairs:
            cell.join(behind)
        self.lengths, self.rows = torch.cat((self.lengths, other.lengths)), object()
        self.given = {name: torch.cat((value, other.given[name])) for name, value in self.given.items()}
        self.start = self.start if self.start == other.start else None
        self.most = max(self.most, other.most)
        return self

    def needs(self, rooms: Sequence[int], memories: Sequence[int] = ()) -> int:
        """The bytes that rows take at most, which grow to so many tokens and read memories of so many."""
        return sum(cell.needs(rooms, memories) for cell in self)

    def mark(self) -> Mark:
        """This moment, to come back to."""
        return Mark(self.start, self.most, self.lengths, [cell.mark() for cell in self], self.rows)

    def rewind(self, mark: Mark, keep: int) -> int:
        """Go back to `keep` tokens after the mark, in every row → how many of those to feed again.

        The beginning of one state, where nothing has been fed, is that of every state with as many rows.
        """
        if len(mark.lengths) != len(self.lengths) or (mark.start != 0 and mark.rows is not self.rows):
            raise QkvError("other rows stand in this state than when it was marked: mark again after select or join")
        kept = keep
        while short := max((cell.rewind(at, kept) for cell, at in zip(self, mark.cells, strict=True)), default=0):
            kept -= short  # where one cell needs tokens again, all must go back as far
        self.lengths, self.most = mark.lengths + kept, mark.most + kept
        self.start = None if mark.start is None else mark.start + kept
        return keep - kept

    def tensors(self) -> dict[str, Tensor]:
        """All that is held, under `position.branch.name`."""
        return {
            f"{n}.{branch}.{name}": tensor
            for n, layer in enumerate(self.cells)
            for branch, cell in layer.items()
            for name, tensor in cell.tensors().items()
        }

    def bytes(self) -> int:
        """The size of all that is held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())
