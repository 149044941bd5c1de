"""Batches of similar length for training, without end and resumable, and for evaluation, each example once.

A file of any size goes the same way: a pool of examples is read, tokenised, shuffled, sorted by length into batches,
and the batches are shuffled. What a pool gives depends only on the seed, the epoch and its first record, so the place
in the data is three numbers. Where the whole file is one pool it is read once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from qkv.data.files import Record, Synthetic, read
from qkv.data.pools import Cursor, Pool, Reader, pair_pool, text_of, text_pool
from qkv.data.tokenizers import BPE, Tokenizer, TokenizerSpec, train_tokenizer
from qkv.errors import QkvError
from qkv.spec import Spec, part

Files: TypeAlias = str | tuple[str, ...] | Synthetic
"""A file, several, or a task that draws its own texts."""


@part("data")
class Data(Spec):
    """What a run reads: pairs from the columns `source` and `target`, or running text from the column `text`.

    `train`, `valid` and `test` are a file or several (`qkv.data.files.read` says which kinds), or a synthetic task; a
    number in place of `valid` is the share at the end of the training files that is not trained on. One tokenizer
    serves both sides unless the target has its own. Training skips pairs with a side of more than `max_tokens`
    positions; text is cut in pieces of `context` positions. `pool` examples are in memory at once.
    """

    train: Files
    valid: Files | float | None = None
    test: Files | None = None
    source: str | None = None
    target: str | None = None
    text: str | None = None
    tokenizer: TokenizerSpec = BPE(8000)
    target_tokenizer: TokenizerSpec | None = None
    max_tokens: int = 256
    context: int = 256
    pool: int = 200_000

    def check(self) -> None:
        given = (self.source is not None, self.target is not None, self.text is not None)
        if given not in ((True, True, False), (False, False, True)):
            raise QkvError("name the columns: either both source and target, for pairs, or text, for running text")
        if self.text is not None and self.target_tokenizer is not None:
            raise QkvError("target_tokenizer is for pairs; running text has only tokenizer")
        if isinstance(self.valid, float) and not 0 < self.valid < 1:
            raise QkvError(f"valid is a file or a share between 0 and 1, not {self.valid:g}")
        for name in ("max_tokens", "context", "pool"):
            if getattr(self, name) < 1:
                raise QkvError(f"{name} is {getattr(self, name)}; at least 1 is needed")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read, the source first."""
        return tuple(name for name in (self.source, self.target, self.text) if name is not None)

    @property
    def longest(self) -> int:
        """The most positions of a training example."""
        return self.max_tokens if self.text is None else self.context


From: TypeAlias = Callable[[int], Iterator[Record]]
"""Records from a number on; what is held out is looked for once, when the first are read."""


def training_records(data: Data, base: Path = Path()) -> From:
    """The records of `data.train`, without what is held out of it."""
    cut = cache(lambda: held_from(data, base))

    def start_at(start: int) -> Iterator[Record]:
        found = read(data.train, data.columns, start=start, base=base)
        return islice(found, max(0, cut() - start)) if isinstance(data.valid, float) else found

    return start_at


def records(data: Data, files: Files | float, base: Path = Path()) -> From:
    """The records of files; those that are held out, where a share is given in their place."""
    if not isinstance(files, float):
        return lambda start: read(files, data.columns, start=start, base=base)
    cut = cache(lambda: held_from(data, base))
    return lambda start: read(data.train, data.columns, start=cut() + start, base=base)


def held_from(data: Data, base: Path) -> int:
    """The first training record of the held out share: it begins where the other share of all characters has ended."""
    assert isinstance(data.valid, float)
    sizes = (sum(map(len, record.values)) + 1 for record in read(data.train, data.columns, base=base))
    ends = np.fromiter(sizes, np.int64).cumsum()
    cut = int(np.searchsorted(ends, (1 - data.valid) * ends[-1])) + 1
    if cut >= len(ends):
        found = "1 record" if len(ends) == 1 else f"{len(ends)} records"
        raise QkvError(
            f"{data.train} has {found}, too few to hold {data.valid:g} of them out: break it into lines, or give "
            "data.valid a file"
        )
    return cut


# --- tokenizers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizer of each side; one and the same where they are joint and for running text."""

    source: Tokenizer
    target: Tokenizer

    @property
    def joint(self) -> bool:
        """Whether both sides share one vocabulary."""
        return self.source is self.target

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and, unless joint, target_tokenizer.json."""
        self.source.save(folder / "tokenizer.json")
        if not self.joint:
            self.target.save(folder / "target_tokenizer.json")

    @classmethod
    def load(cls, folder: Path, joint: bool) -> Self:
        """The tokenizers that `save` left in a folder."""
        source = Tokenizer.load(folder / "tokenizer.json")
        return cls(source, source if joint else Tokenizer.load(folder / "target_tokenizer.json"))


def train_tokenizers(data: Data, base: Path = Path()) -> Tokenizers:
    """Train what `data` describes on its training files; relative paths stand in `base`."""

    def trained() -> Iterator[Record]:
        return begin(0)

    begin = training_records(data, base)

    if data.text is not None:
        joint = train_tokenizer(data.tokenizer, (text_of(record) for record in trained()))
    elif data.target_tokenizer is None:
        joint = train_tokenizer(data.tokenizer, (text for record in trained() for text in record.values))
    else:
        source = train_tokenizer(data.tokenizer, (record.values[0] for record in trained()))
        return Tokenizers(source, train_tokenizer(data.target_tokenizer, (record.values[1] for record in trained())))
    return Tokenizers(joint, joint)


# --- batches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rows of ids, packed to the left and padded to the right; B rows, S and T the longest.

    `target` (B T) holds <s> … </s>, or a piece of running text: the model reads `target[:, :-1]` and its labels are
    `target[:, 1:]`, of which row b has `target_lengths[b] - 1`. `source` (B S) ends in </s>; it is None for running
    text. Lengths and `index` are (B); `index` is where each row stood among the examples: in evaluation of the whole
    file, in training of its pool.
    """

    source: Tensor | None
    source_lengths: Tensor | None
    target: Tensor
    target_lengths: Tensor
    index: Tensor

    @property
    def tokens(self) -> int:
        """How many labels the batch has, over which a loss is averaged."""
        return int(self.target_lengths.sum()) - len(self.target)

    @property
    def padding(self) -> float:
        """The share of the positions that go through the model only to make rows equally long."""
        held = self.target[:, 1:].numel()
        real = self.tokens
        if self.source is not None and self.source_lengths is not None:
            held, real = held + self.source.numel(), real + int(self.source_lengths.sum())
        return 1 - real / held

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        there: dict[str, Any] = {n: None if value is None else value.to(device) for n, value in vars(self).items()}
        return replace(self, **there)


def pad_rows(rows: Sequence[np.ndarray | Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids of rows (B longest), packed to the left, and their lengths (B)."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = np.full((len(rows), int(lengths.max())), pad, np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return torch.from_numpy(ids), lengths


def by_length(lengths: np.ndarray, tokens_per_batch: int, order: np.ndarray | None = None) -> list[np.ndarray]:
    """Rows cut into batches of similar length; `lengths` is N sides, `order` says which of equal rows comes first.

    The padded size of a batch is its rows times the longest of all its sides, that is the larger of its two matrices:
    so both the encoder's and the decoder's memory and time have a bound. It is at most `tokens_per_batch`; a longer
    row is a batch of its own. Rows are sorted by their longer side, then by how much longer that is, forwards and
    backwards in turn, so that neither side jumps (5 % less padding than sorting one side after the other at 4,096).
    """
    longer, gap = lengths.max(1), lengths[:, -1] - lengths[:, 0]
    order = np.arange(len(lengths)) if order is None else order
    order = order[np.lexsort((np.where(longer % 2, gap, -gap)[order], longer[order]))]
    cuts, first = [], 0
    for i, longest in enumerate(longer[order].tolist()):  # ascending: the last row is the longest
        if i > first and longest * (i + 1 - first) > tokens_per_batch:
            cuts.append(i)
            first = i
    return np.split(order, cuts) if len(order) else []


def _lengths(pool: Pool) -> np.ndarray:
    """Positions in the model, N sides: a target row is read up to its last token."""
    sides = ([] if pool.source is None else [pool.source.lengths]) + [pool.target.lengths - 1]
    return np.stack(sides, 1)


def _batch(pool: Pool, rows: np.ndarray, tokenizers: Tokenizers, first: int = 0) -> Batch:
    source = source_lengths = None
    if pool.source is not None:
        source, source_lengths = pad_rows([pool.source[row] for row in rows], tokenizers.source.pad)
    target, target_lengths = pad_rows([pool.target[row] for row in rows], tokenizers.target.pad)
    return Batch(source, source_lengths, target, target_lengths, torch.from_numpy(pool.index[rows] + first))


def _reader(data: Data, records: From, tokenizers: Tokenizers, longest: int | None = None) -> Reader:
    def fill(cursor: Cursor) -> Pool:
        if data.text is not None:
            return text_pool(cursor, tokenizers.target, data.pool, data.context)
        return pair_pool(cursor, tokenizers.source, tokenizers.target, data.pool, longest)

    return Reader(records, fill)


class EvaluationBatches:
    """Every example of the files once, however long it is, by length within a pool; `index` gives back their order.

    It may be gone through again: what one pool can hold is read and tokenised once.
    """

    def __init__(
        self, data: Data, files: Files | float, tokenizers: Tokenizers, tokens_per_batch: int, *, base: Path = Path()
    ) -> None:
        self._tokenizers, self._size = tokenizers, tokens_per_batch
        self._reader = _reader(data, records(data, files, base), tokenizers)
        self._whole: Pool | None = None

    def __iter__(self) -> Iterator[Batch]:
        start = first = 0
        while True:
            pool = self._whole or self._reader.pool(start)
            if pool.last and start == 0:
                self._whole = pool
            for rows in by_length(_lengths(pool), self._size):
                yield _batch(pool, rows, self._tokenizers, first)
            start, first = start + pool.records, first + pool.examples
            if pool.last:
                return


class TrainingBatches:
    """The training examples in shuffled batches without end, every example once in each epoch.

    `epoch` counts from 0; `skipped` is how many different examples have been too long so far. `state` and `restore`
    continue with exactly the batches that would have come, given the same data, tokenizers, seed and
    `tokens_per_batch`; whether the files still hold the same is not looked at.
    Raises QkvError where no example is short enough, or where a restored place is not there in the data.
    """

    def __init__(
        self, data: Data, tokenizers: Tokenizers, tokens_per_batch: int, *, seed: int = 0, base: Path = Path()
    ) -> None:
        if data.longest > tokens_per_batch:
            name = "max_tokens" if data.text is None else "context"
            raise QkvError(
                f"tokens_per_batch is {tokens_per_batch}, too few for one example of {name} = {data.longest}; "
                "raise the one or lower the other"
            )
        self._data, self._tokenizers, self._size, self._seed = data, tokenizers, tokens_per_batch, seed
        self._reader = _reader(data, training_records(data, base), tokenizers, data.longest)
        self._whole: Pool | None = None
        self._place(epoch=0, record=0, batch=0, skipped=0)

    def _place(self, epoch: int, record: int, batch: int, skipped: int) -> None:
        self.epoch, self._record, self._batch, self._skipped = epoch, record, batch, skipped
        self._pool: Pool | None = None
        self._plan: list[np.ndarray] = []

    @property
    def skipped(self) -> int:
        """How many examples were too long, of those read so far; after the first epoch, of all."""
        return self._skipped + (self._pool.skipped if self._pool and self.epoch == 0 else 0)

    def state(self) -> dict[str, int]:
        """The place in the data: epoch, first record of the pool, next batch in it, and `skipped` before the pool."""
        return {"epoch": self.epoch, "record": self._record, "batch": self._batch, "skipped": self._skipped}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a place that `state` gave."""
        if state.keys() != self.state().keys():
            raise QkvError(f"a place in the data has {', '.join(self.state())}; found {', '.join(state) or 'nothing'}")
        self._place(**state)
        pool = self._load()
        if self._batch > len(self._plan) or (self._record and not pool.examples):
            raise QkvError(
                f"the training data has no batch {self._batch} after record {self._record}, where the saved run stood: "
                "the files, or the settings that cut them into batches, have changed since"
            )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        pool = self._pool or self._load()
        while self._batch == len(self._plan):
            read = self._record + pool.records
            if pool.last and self.skipped == read:
                raise QkvError(
                    f"none of the {read} training examples has at most max_tokens = {self._data.max_tokens} positions "
                    "on each side; raise max_tokens"
                )
            if pool.last:
                self._place(self.epoch + 1, record=0, batch=0, skipped=self.skipped)
            else:
                self._place(self.epoch, record=read, batch=0, skipped=self.skipped)
            pool = self._load()
        self._batch += 1
        return _batch(pool, self._plan[self._batch - 1], self._tokenizers)

    def _load(self) -> Pool:
        """Read the pool of this place, or take the one that holds everything, and lay out its batches."""
        pool = self._whole or self._reader.pool(self._record)
        if pool.last and self._record == 0:
            self._whole = pool
        chance = np.random.default_rng([self._seed, self.epoch, self._record])
        batches = by_length(_lengths(pool), self._size, chance.permutation(len(pool.index)))
        self._pool, self._plan = pool, [batches[i] for i in chance.permutation(len(batches))]
        return pool
