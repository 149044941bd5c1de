"""Pools: as many tokenised examples as stand in memory at once, read one after another through the files."""

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from qkv.data.files import Record, is_plain
from qkv.data.tokenizers import Tokenizer

CHUNK_RECORDS, CHUNK_CHARACTERS = 1000, 2**20  # what is tokenised at a time, whichever is reached first


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, of different lengths, in one array of four bytes a token; rows may overlap."""

    flat: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.flat[self.starts[row] : self.ends[row]]

    @property
    def lengths(self) -> np.ndarray:
        """The length of each row."""
        return self.ends - self.starts


@dataclass(frozen=True)
class Pool:
    """Examples that were read together.

    `index` is the number of each in its pool, and `examples` how many were read; those that were too long are counted
    in both and `skipped`. `records` is how far this took us through the files, and `last` that they end here.
    """

    source: Rows | None
    target: Rows
    index: np.ndarray
    examples: int
    skipped: int
    records: int
    last: bool


class Cursor:
    """Records with a view of the next one, `ahead`, which is None at the end."""

    def __init__(self, records: Iterator[Record]) -> None:
        self._records = records
        self.ahead = next(records, None)
        self.taken = 0

    def take(self, limit: int) -> list[Record]:
        """The next records: at most `limit`, and no more than are tokenised at a time."""
        taken: list[Record] = []
        characters = 0
        while self.ahead is not None and len(taken) < min(limit, CHUNK_RECORDS) and characters < CHUNK_CHARACTERS:
            taken.append(self.ahead)
            characters += sum(map(len, self.ahead.values))
            self.ahead = next(self._records, None)
        self.taken += len(taken)
        return taken


class Reader:
    """Pools by the number of their first record; pools that follow each other are read without opening files anew."""

    def __init__(self, open: Callable[[int], Iterator[Record]], fill: Callable[[Cursor], Pool]) -> None:
        self._open, self._fill = open, fill
        self._cursor: Cursor | None = None
        self._next = 0

    def pool(self, start: int) -> Pool:
        """The pool that begins with record number `start`."""
        if self._cursor is None or start != self._next:
            self._cursor = Cursor(self._open(start))
        pool = self._fill(self._cursor)
        self._next = start + pool.records
        return pool


def pair_pool(cursor: Cursor, source: Tokenizer, target: Tokenizer, size: int, longest: int | None) -> Pool:
    """A pool of the next `size` pairs: `source </s>` and `<s> target </s>`.

    A pair of which a side takes more than `longest` positions in the model is skipped: the source's length is that of
    its row, the target's one less, since a row is both what the decoder reads and, moved by one, what it shall say.
    """
    before = cursor.taken
    sides: tuple[_Growing, _Growing] = _Growing(), _Growing()
    index = array("q")
    number = 0
    while chunk := cursor.take(size - number):
        sources = source.encode_batch([record.values[0] for record in chunk])
        targets = target.encode_batch([record.values[1] for record in chunk])
        for said, meant in zip(sources, targets, strict=True):
            if longest is None or max(len(said), len(meant)) < longest:
                sides[0].append([*said, source.end])
                sides[1].append([target.begin, *meant, target.end])
                index.append(number)
            number += 1
    return Pool(
        source=sides[0].rows(),
        target=sides[1].rows(),
        index=np.array(index, np.int64),
        examples=number,
        skipped=number - len(index),
        records=cursor.taken - before,
        last=cursor.ahead is None,
    )


def text_pool(cursor: Cursor, tokenizer: Tokenizer, size: int, context: int) -> Pool:
    """A pool of about `size` pieces of running text, each of `context` + 1 tokens, the last of which begins the next.

    The stream is `<s> document </s> <s> document </s> …`. It is cut anew in each pool, whose last piece may be shorter.
    """
    before = cursor.taken
    stream = array("i")
    while len(stream) <= size * context and (chunk := cursor.take(size)):
        ids = tokenizer.encode_batch([text_of(record) for record in chunk])
        for record, after, tokens in zip(chunk, [*chunk[1:], cursor.ahead], ids, strict=True):
            if _begins(record):
                stream.append(tokenizer.begin)
            stream.extend(tokens)
            if after is None or _begins(after):
                stream.append(tokenizer.end)
    starts = np.arange(0, len(stream) - 1, context)
    pieces = Rows(np.array(stream, np.int32), starts, np.minimum(starts + context + 1, len(stream)))
    return Pool(
        source=None,
        target=pieces,
        index=np.arange(len(pieces)),
        examples=len(pieces),
        skipped=0,
        records=cursor.taken - before,
        last=cursor.ahead is None,
    )


def text_of(record: Record) -> str:
    """What a record adds to running text: a line of plain text ends in a newline, a table's text is a document."""
    return record.values[0] + "\n" if _is_plain(record.path) else record.values[0]


def _begins(record: Record) -> bool:
    """Whether a record begins a document: a table's always does, and a plain file is one document."""
    return record.line == 1 or not _is_plain(record.path)


@cache
def _is_plain(path: Path) -> bool:
    return is_plain(path)


class _Growing:
    """Rows while they are read."""

    def __init__(self) -> None:
        self._flat, self._ends = array("i"), array("q", [0])

    def append(self, row: list[int]) -> None:
        self._flat.extend(row)
        self._ends.append(len(self._flat))

    def rows(self) -> Rows:
        ends = np.array(self._ends, np.int64)
        return Rows(np.array(self._flat, np.int32), ends[:-1], ends[1:])
