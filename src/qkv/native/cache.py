"""Keys and values in pages: texts that share a beginning share its pages, and nothing is moved when a text grows."""

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from qkv.native.library import PAGE, Cache, Engine, Numbers, lanes

NONE = torch.empty(0)


class Pages:
    """Pages of 64 positions for all layers of a program, counted by how many texts hold them."""

    def __init__(self, engine: Engine, size: int, run: int | None = None) -> None:
        self.engine, self.size, self.run = engine, size, run
        """Bytes; a run is what each head's keys, and its values, take of a page, if that is as much for all."""
        self.lock = threading.RLock()
        self.memory: list[Tensor] = []
        self.address = np.zeros(0, np.uint64)
        self.held = np.zeros(0, np.int32)
        self.free: list[int] = []
        self.lately = 0
        self.left: deque[Numbers] = deque()
        """Those of texts that died, in whatever thread and between whatever steps: dropped when some are needed."""

    def settle(self) -> None:
        """Drop the pages of texts that died; for those to come is kept as much memory as was lately held."""
        if not self.left:
            return
        self.lately = max(int(np.count_nonzero(self.held)), self.lately // 2)
        while self.left:
            self.drop(self.left.popleft())
        for page in self.free[: len(self.memory) - self.lately]:  # those that were used last stand last
            self.memory[page] = NONE

    def take(self) -> int:
        """A page for one text."""
        if not self.free:
            grown = max(8, len(self.memory))
            self.memory += [NONE] * grown
            self.free = list(range(len(self.held) + grown - 1, len(self.held) - 1, -1))
            self.address, self.held = np.resize(self.address, len(self.memory)), np.append(self.held, [0] * grown)
        page = self.free.pop()
        if not len(self.memory[page]):
            self.memory[page] = torch.zeros(self.size, dtype=torch.uint8)
            self.address[page] = self.memory[page].data_ptr()
        self.held[page] = 1
        return page

    def hold(self, table: Numbers, counts: Numbers) -> None:
        """One more text holds the first counts[b] pages of each row b of a table."""
        with self.lock:
            np.add.at(self.held, filled(table, counts), 1)

    def drop(self, pages: Numbers) -> None:
        with self.lock:
            np.subtract.at(self.held, pages, 1)
            self.free += np.unique(pages[self.held[pages] == 0]).tolist()

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """From one page to another what stands in its first positions: (from, to, positions)."""
        if not copies or not self.size:  # what keeps nothing by position has pages of no bytes
            return
        old, new, used = np.array(copies).T
        run = self.run or self.size
        parts = run * -(-used // lanes()) // (PAGE // lanes()) if self.run else np.full(len(copies), run)
        self.engine.copy(self.address[old], self.address[new], parts, self.size // run, run)


class Paged:
    """The cell of a whole program: which pages hold the keys and values of each text."""

    def __init__(self, pages: Pages, batch: int) -> None:
        self.pages = pages
        self.table = np.zeros((batch, 4), np.int32)
        self.counts = np.zeros(batch, np.int32)

    def reserve(self, starts: Numbers, ends: Numbers) -> None:
        """Room to write positions starts[b] to ends[b] of each text b; a page that others hold is copied first."""
        pages, copies = self.pages, list[tuple[int, int, int]]()
        with pages.lock:
            pages.settle()
            for row in self.unready(starts, ends).tolist():
                start = int(starts[row])
                for n in range(start // PAGE, -(-int(ends[row]) // PAGE)):
                    if n >= self.counts[row]:
                        self.add(row)
                    elif pages.held[shared := int(self.table[row, n])] > 1:
                        pages.held[shared] -= 1
                        self.table[row, n] = own = pages.take()
                        copies.append((shared, own, max(0, start - n * PAGE)))
            pages.copy(copies)

    def unready(self, starts: Numbers, ends: Numbers) -> Numbers:
        """The texts that may lack a page of their own: seen at a glance where each writes to one that it holds."""
        n, rows = starts // PAGE, np.arange(len(starts))
        if (ends > (n + 1) * PAGE).any() or (n >= self.counts).any():
            return rows
        return rows[self.pages.held[self.table[rows, n]] > 1]

    def add(self, row: int) -> None:
        if self.counts[row] == self.table.shape[1]:
            self.table = np.concatenate((self.table, np.zeros_like(self.table)), 1)
        self.table[row, self.counts[row]] = self.pages.take()
        self.counts[row] += 1

    def seen(self, lengths: Numbers) -> Cache:
        """What the kernels read: texts of these lengths (int32)."""
        address, table = self.pages.address, self.table
        seen = Cache(address.ctypes.data, table.ctypes.data, table.shape[1], lengths.ctypes.data)
        seen.arrays = address, table, lengths  # which live as long as it points to them
        return seen

    # --- the contract of a cell ---

    def tensors(self) -> dict[str, Tensor]:
        used = np.unique(filled(self.table, self.counts)).tolist()
        return {f"page {page}": self.pages.memory[page] for page in used}

    def select(self, rows: Tensor) -> None:
        chosen = rows.cpu().numpy()
        table, counts = self.table[chosen], self.counts[chosen]
        self.pages.hold(table, counts)
        self.release()
        self.table, self.counts = table, counts

    def fork(self, rows: Tensor | None, room: int) -> "Paged":
        """Pages are shared until one of those that hold them writes."""
        chosen = slice(None) if rows is None else rows.cpu().numpy()
        made = Paged(self.pages, 0)
        made.table, made.counts = self.table[chosen].copy(), np.minimum(self.counts[chosen], -(-room // PAGE))
        self.pages.hold(made.table, made.counts)
        return made

    def join(self, other: Self) -> None:
        width = max(self.table.shape[1], other.table.shape[1])
        self.pages.hold(other.table, other.counts)
        tables = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in (self.table, other.table)]
        self.table, self.counts = np.concatenate(tables), np.concatenate((self.counts, other.counts))

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        return sum(-(-room // PAGE) for room in rooms) * self.pages.size

    def mark(self) -> Any:
        return None

    def rewind(self, mark: Any, keep: int) -> int:
        return 0

    def release(self) -> None:
        self.pages.drop(filled(self.table, self.counts))
        self.counts = np.zeros_like(self.counts)

    def __del__(self) -> None:
        self.pages.left.append(filled(self.table, self.counts))


def filled(table: Numbers, counts: Numbers) -> Numbers:
    """The first counts[b] numbers of each row b, one row after the other."""
    return table[np.arange(table.shape[1]) < counts[:, None]]


class Read:
    """The cell of the memories that a decoder reads: their pages, and which of them each row reads."""

    def __init__(self, memories: Paged, lengths: Numbers) -> None:
        self.memories, self.lengths = memories, lengths
        self.of = np.arange(len(lengths), dtype=np.int32)

    def fields(self) -> dict[str, Any]:
        """What the kernels read, as fields of a call."""
        return {"memory": self.memories.seen(self.lengths), "memory_of": self.of}

    def tensors(self) -> dict[str, Tensor]:
        return self.memories.tensors()

    def select(self, rows: Tensor) -> None:
        """A memory that no row reads any longer is let go."""
        read, of = np.unique(self.of[rows.cpu().numpy()], return_inverse=True)
        if len(read) < len(self.lengths):
            self.memories.select(torch.from_numpy(read))
            self.lengths = self.lengths[read]
        self.of = of.astype(np.int32)

    def fork(self, rows: Tensor | None, room: int) -> "Read":
        made = Read(self.memories.fork(None, self.memories.table.shape[1] * PAGE), self.lengths)
        made.of = self.of
        if rows is not None:
            made.select(rows)
        return made

    def join(self, other: Self) -> None:
        self.of = np.concatenate((self.of, other.of + np.int32(len(self.lengths))))
        self.memories.join(other.memories)
        self.lengths = np.concatenate((self.lengths, other.lengths))

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        return self.memories.needs(memories, ())

    def mark(self) -> Any:
        return None

    def rewind(self, mark: Any, keep: int) -> int:
        return 0


class Held:
    """The cell of what a program's recurrences remember: a row of floats for each text, replaced in place."""

    def __init__(self, batch: int, size: int) -> None:
        self.now = torch.zeros(batch, size, dtype=torch.uint8)

    def fields(self) -> dict[str, Any]:
        """What the kernels read, as fields of a call."""
        return {"states": (self.now.data_ptr() + self.now.stride(0) * np.arange(len(self.now))).astype(np.uint64)}

    def tensors(self) -> dict[str, Tensor]:
        return {"states": self.now}

    def select(self, rows: Tensor) -> None:
        self.now = self.now[rows]

    def fork(self, rows: Tensor | None, room: int) -> "Held":
        made = Held(0, self.now.shape[1])
        made.now = self.now.clone() if rows is None else self.now[rows]
        return made

    def join(self, other: Self) -> None:
        self.now = torch.cat((self.now, other.now))

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        return len(rooms) * self.now.shape[1]

    def mark(self) -> Any:
        return self.now.clone()

    def rewind(self, mark: Any, keep: int) -> int:
        """Back to the mark itself: a recurrence cannot be run backwards, so all `keep` tokens are fed again."""
        self.now = mark.clone()
        return keep
