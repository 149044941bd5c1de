"""Batches: every example once an epoch, in the same order each time, from any place on; and what they hold."""

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.data.batches import (
    Batch,
    Data,
    EvaluationBatches,
    Tokenizers,
    TrainingBatches,
    by_length,
    pad_rows,
    train_tokenizers,
)
from qkv.data.tokenizers import BPE, Character, Symbols, Word
from qkv.errors import QkvError
from qkv.spec import dump, load

WORDS = ["ein", "Hund", "我", "爱", "läuft", "über", "die", "Wiese", "你", "heute"]


def pairs(count: int) -> list[tuple[str, str]]:
    """Pairs of different lengths, each of them once."""
    chance = np.random.default_rng(0)
    sides = [[" ".join(chance.choice(WORDS, chance.integers(0, 12))) for _ in range(2)] for _ in range(count)]
    return [(f"{i} {source}".strip(), target) for i, (source, target) in enumerate(sides)]


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("en\tde\n" + "".join(f"{source}\t{target}\n" for source, target in rows), encoding="utf-8")


def setup(folder: Path, rows: list[tuple[str, str]], **settings: object) -> tuple[Data, Tokenizers]:
    write(folder / "train.tsv", rows)
    data = load(
        {"train": "train.tsv", "source": "en", "target": "de", "tokenizer": {"kind": "symbols"}} | settings, Data
    )
    return data, train_tokenizers(data, folder)


def contents(batch: Batch, tokenizers: Tokenizers) -> list[tuple[str, str]]:
    """The texts of a batch, from its ids and lengths alone."""
    assert batch.source is not None and batch.source_lengths is not None
    rows = zip(batch.source, batch.source_lengths, batch.target, batch.target_lengths, strict=True)
    return [(tokenizers.source.decode(s[:m].tolist()), tokenizers.target.decode(t[:n].tolist())) for s, m, t, n in rows]


def same(a: Batch, b: Batch) -> bool:
    return all(
        (x is None and y is None) or torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def epoch(batches: TrainingBatches) -> Iterator[Batch]:
    """The batches of the present epoch and the first of the next."""
    for batch in batches:
        yield batch
        if batches.epoch > 0:
            return


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 7, 20, 59, 60, 61, 1000])
def test_every_example_once_in_each_epoch(tmp_path: Path, pool: int) -> None:
    rows = pairs(60)
    data, tokenizers = setup(tmp_path, rows, pool=pool, max_tokens=30)
    batches = TrainingBatches(data, tokenizers, 64, seed=1, base=tmp_path)
    seen: dict[int, list[tuple[str, str]]] = {}
    while batches.epoch < 3:
        batch = next(batches)
        seen.setdefault(batches.epoch, []).extend(contents(batch, tokenizers))
    for number in range(3):
        assert Counter(seen[number]) == Counter(rows)
    if pool > 1:
        assert seen[0] != seen[1] != seen[2] != seen[0]


def test_rows_are_framed_packed_left_and_padded_right(tmp_path: Path) -> None:
    data, tokenizers = setup(tmp_path, [("a b c", "x"), ("d", "y z w v")])
    assert tokenizers.joint
    (batch,) = EvaluationBatches(data, "train.tsv", tokenizers, 100, base=tmp_path)
    a, b, c, d, v, w, x, y, z = (tokenizers.source.encode(letter)[0] for letter in "abcdvwxyz")
    expected = {(a, b, c, 3): (2, x, 3, 0, 0, 0), (d, 3, 0, 0): (2, y, z, w, v, 3)}
    assert batch.source is not None and batch.source_lengths is not None
    assert dict(zip(map(tuple, batch.source.tolist()), map(tuple, batch.target.tolist()), strict=True)) == expected
    assert batch.source_lengths.tolist() == [[4, 2][i] for i in batch.index]
    assert batch.target_lengths.tolist() == [[3, 6][i] for i in batch.index]
    assert batch.tokens == 2 + 5 == int((batch.target[:, 1:] != 0).sum())
    assert batch.padding == pytest.approx(1 - (4 + 2 + 2 + 5) / (2 * 4 + 2 * 5))
    assert same(batch.to("cpu"), batch)
    assert batch.source.dtype == batch.target.dtype == torch.int64


@pytest.mark.parametrize("pool", [13, 1000])
def test_no_batch_is_larger_than_asked(tmp_path: Path, pool: int) -> None:
    data, tokenizers = setup(tmp_path, pairs(200), pool=pool, max_tokens=16)
    batches = list(epoch(TrainingBatches(data, tokenizers, 48, base=tmp_path)))
    for batch in batches:
        assert batch.source is not None
        assert max(batch.source.numel(), batch.target[:, 1:].numel()) <= 48
    if pool == 1000:
        assert np.mean([batch.padding for batch in batches]) < 0.15


@pytest.mark.parametrize("pool", [16, 1000])
def test_a_resumed_run_gives_the_very_same_batches(tmp_path: Path, pool: int) -> None:
    data, tokenizers = setup(tmp_path, pairs(50), pool=pool, max_tokens=12)
    run = TrainingBatches(data, tokenizers, 40, seed=3, base=tmp_path)
    states, batches, skipped = [], [], []
    while run.epoch < 2:
        states.append(json.loads(json.dumps(run.state())))
        batches.append(next(run))
        skipped.append((run.epoch, run.skipped))
    assert len(batches) > 20
    for i, state in enumerate(states):
        resumed = TrainingBatches(data, tokenizers, 40, seed=3, base=tmp_path)
        resumed.restore(state)
        for j in range(i, min(i + 8, len(batches))):
            assert same(next(resumed), batches[j]), f"from {i}, batch {j}"
            assert (resumed.epoch, resumed.skipped) == skipped[j]
    run.restore(states[5])  # also backwards, in an object that is in use
    assert same(next(run), batches[5])


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    data, tokenizers = setup(tmp_path, pairs(40), max_tokens=30)

    def first(seed: int, count: int = 30) -> list[Batch]:
        return list(itertools.islice(TrainingBatches(data, tokenizers, 40, seed=seed, base=tmp_path), count))

    assert all(map(same, first(0), first(0)))
    assert not all(map(same, first(0), first(1)))


def test_a_file_of_one_pool_is_read_once(tmp_path: Path) -> None:
    data, tokenizers = setup(tmp_path, pairs(30), max_tokens=30)
    batches = TrainingBatches(data, tokenizers, 64, base=tmp_path)
    next(batches)
    (tmp_path / "train.tsv").unlink()
    while batches.epoch < 3:
        next(batches)


def test_pairs_that_are_too_long_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [("a " * n + "a", "b") for n in range(8)] + [("a", "b " * n + "b") for n in range(1, 8)]
    for pool in (4, 100):
        data, tokenizers = setup(tmp_path, rows, max_tokens=6, pool=pool)
        batches = TrainingBatches(data, tokenizers, 12, base=tmp_path)
        found: list[tuple[str, str]] = []
        while batches.epoch < 2:
            found += contents(next(batches), tokenizers)
        # a source of n words takes n + 1 positions with </s>, a target n + 1 with <s>
        kept = [(s, t) for s, t in rows if max(len(s.split()), len(t.split())) <= 5]
        assert set(found) == set(kept)
        assert batches.skipped == len(rows) - len(kept) == 6
        everything = [
            pair
            for batch in EvaluationBatches(data, "train.tsv", tokenizers, 12, base=tmp_path)
            for pair in contents(batch, tokenizers)
        ]
        assert Counter(everything) == Counter(rows)


def test_nothing_left_is_said(tmp_path: Path) -> None:
    for pool in (2, 100):
        data, tokenizers = setup(tmp_path, [("a b c", "d e f")] * 5, max_tokens=3, pool=pool)
        with pytest.raises(QkvError, match="none of the 5 training examples has at most max_tokens = 3 positions"):
            next(TrainingBatches(data, tokenizers, 12, base=tmp_path))


def test_a_place_that_the_data_does_not_have(tmp_path: Path) -> None:
    data, tokenizers = setup(tmp_path, pairs(40), pool=16, max_tokens=30)
    run = TrainingBatches(data, tokenizers, 64, base=tmp_path)
    while run.state()["record"] < 32:
        next(run)
    state = run.state()
    write(tmp_path / "train.tsv", pairs(20))
    for wrong in (state, state | {"record": 0, "batch": 99}):
        with pytest.raises(QkvError, match=r"where the saved run stood: the files, or the settings .* have changed"):
            TrainingBatches(data, tokenizers, 64, base=tmp_path).restore(wrong)
    with pytest.raises(QkvError, match=r"has epoch, record, batch, skipped; found epoch"):
        run.restore({"epoch": 0})


def test_batches_must_hold_the_longest_example(tmp_path: Path) -> None:
    data, tokenizers = setup(tmp_path, pairs(5))
    with pytest.raises(QkvError, match="tokens_per_batch is 255, too few for one example of max_tokens = 256"):
        TrainingBatches(data, tokenizers, 255, base=tmp_path)


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [9, 1000])
def test_evaluation_gives_all_in_an_order_that_can_be_undone(tmp_path: Path, pool: int) -> None:
    rows = pairs(50)
    data, tokenizers = setup(tmp_path, rows, pool=pool, max_tokens=4)
    found: dict[int, tuple[str, str]] = {}
    for batch in EvaluationBatches(data, ("train.tsv",), tokenizers, 64, base=tmp_path):
        for index, pair in zip(batch.index.tolist(), contents(batch, tokenizers), strict=True):
            assert index not in found
            found[index] = pair
    assert [found[i] for i in range(50)] == rows


# --- cutting into batches -------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=60), st.integers(10, 60))
def test_by_length_cuts_every_row_into_one_batch_that_fits(lengths: list[tuple[int, int]], size: int) -> None:
    table = np.array(lengths, dtype=np.int64).reshape(-1, 2)
    order = np.random.default_rng(len(lengths)).permutation(len(lengths))
    batches = by_length(table, size, order)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * table[batch].max() <= size or len(batch) == 1
    for batch, after in itertools.pairwise(batches):  # none could have taken the next row too
        assert (len(batch) + 1) * max(table[batch].max(), table[after[0]].max()) > size
        assert table[batch].max() <= table[after].max(1).min()


def test_sorting_keeps_padding_low() -> None:
    """Against batches in the order of the file and against the usual sort, by source and then by target."""
    chance = np.random.default_rng(0)
    source = np.clip(chance.lognormal(2.5, 0.4, 20_000), 3, 60).astype(int)
    target = np.clip(source * chance.normal(1.05, 0.15, 20_000), 3, 60).astype(int)
    table = np.stack([source, target], 1)

    def waste(batches: list[np.ndarray]) -> float:
        return 1 - table.sum() / sum(len(batch) * table[batch].max(0).sum() for batch in batches)

    usual = np.lexsort((target, source))
    cut = [0]
    for i in range(len(usual)):
        if table[usual[cut[-1] : i + 1]].max() * (i + 1 - cut[-1]) > 4096:
            cut.append(i)
    ours, theirs = waste(by_length(table, 4096)), waste(np.split(usual, cut[1:]))
    assert ours < 0.06 and ours < 0.8 * theirs, (ours, theirs)


def test_pad_rows() -> None:
    ids, lengths = pad_rows([[5, 6, 7], np.array([8]), []], pad=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]] and lengths.tolist() == [3, 1, 0]


# --- running text ---------------------------------------------------------------------------------------------------


def text_data(folder: Path, files: str | tuple[str, ...], **settings: object) -> tuple[Data, Tokenizers]:
    tables = {"train": files, "text": "text", "tokenizer": {"kind": "character"}, "context": 8} | settings
    data = load(tables, Data)
    return data, train_tokenizers(data, folder)


def stream(batches: Iterator[Batch]) -> list[int]:
    """The tokens of evaluation batches put together again; each piece begins with the last token of the one before."""
    pieces = {}
    for batch in batches:
        assert batch.source is None
        for index, row, length in zip(batch.index.tolist(), batch.target, batch.target_lengths, strict=True):
            pieces[index] = row[:length].tolist()
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(pieces[i] for i in range(len(pieces))))
    return pieces[0] + [token for i in range(1, len(pieces)) for token in pieces[i][1:]]


def test_a_plain_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    texts = ["To be, or not to be\n\nthat is the 我\n", "second\n"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    data, tokenizers = text_data(tmp_path, ("0.txt", "1.txt"))
    tokenizer = tokenizers.target
    found = stream(EvaluationBatches(data, data.train, tokenizers, 16, base=tmp_path))
    expected = [[tokenizer.begin, *tokenizer.encode(text), tokenizer.end] for text in texts]
    assert found == expected[0] + expected[1]
    assert tokenizer.unknown not in found


def test_a_table_of_texts_is_a_document_each(tmp_path: Path) -> None:
    rows = ["one", "two\nlines", ""]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps({"text": r}) + "\n" for r in rows).encode()))
    data, tokenizers = text_data(tmp_path, "a.jsonl.gz")
    tokenizer = tokenizers.target
    found = stream(EvaluationBatches(data, "a.jsonl.gz", tokenizers, 16, base=tmp_path))
    assert found == [i for row in rows for i in (tokenizer.begin, *tokenizer.encode(row), tokenizer.end)]


@pytest.mark.parametrize("pool", [3, 1000])
def test_every_label_of_a_text_once_in_each_epoch(tmp_path: Path, pool: int) -> None:
    lines = [f"{i} {' '.join(WORDS[: i % 9])}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    data, tokenizers = text_data(tmp_path, "a.txt", pool=pool)
    run = TrainingBatches(data, tokenizers, 20, base=tmp_path)
    labels: dict[int, Counter[int]] = {0: Counter(), 1: Counter()}
    states, batches = [], []
    while run.epoch < 2:
        states.append(run.state())
        batch = next(run)
        batches.append(batch)
        assert batch.target.shape[1] <= 9 and batch.target[:, 1:].numel() <= 20
        for row, length in zip(batch.target, batch.target_lengths, strict=True):
            labels.setdefault(run.epoch, Counter()).update(row[1:length].tolist())
    tokenizer = tokenizers.target
    expected = Counter([*tokenizer.encode("\n".join(lines) + "\n"), tokenizer.end])
    missing = expected - labels[0]
    assert labels[0] == labels[1] and not labels[0] - expected
    assert missing.total() == 0 if pool == 1000 else missing.total() < 40  # one label where a pool begins
    for i in range(0, len(states), 5):
        resumed = TrainingBatches(data, tokenizers, 20, base=tmp_path)
        resumed.restore(states[i])
        assert same(next(resumed), batches[i])


# --- the recipe's table and its tokenizers --------------------------------------------------------------------------


def test_the_table_of_a_recipe_comes_back(tmp_path: Path) -> None:
    table = {
        "train": ["a.en.gz", "a.de.gz"],
        "source": "en",
        "target": "de",
        "tokenizer": {"kind": "word", "lowercase": True},
        "target_tokenizer": {"kind": "bpe", "size": 300},
    }
    data = load(table, Data)
    assert data.tokenizer == Word(lowercase=True) and data.target_tokenizer == BPE(300)
    assert load(dump(data), Data) == data and data.columns == ("en", "de")
    assert Data("a.txt", text="text").tokenizer == BPE(8000)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "either both source and target, for pairs, or text"),
        ({"source": "en"}, "either both source and target"),
        ({"source": "en", "target": "de", "text": "t"}, "either both source and target"),
        ({"text": "t", "target_tokenizer": Character()}, "target_tokenizer is for pairs"),
        ({"text": "t", "context": 0}, "context is 0; at least 1 is needed"),
        ({"text": "t", "pool": 0}, "pool is 0; at least 1 is needed"),
    ],
)
def test_tables_that_cannot_work(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(QkvError, match=sentence):
        Data("train.tsv", **fields)


def test_joint_and_separate_tokenizers(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", [("cat", "K AE T"), ("dog", "D AO G")])
    for own in (None, Symbols()):
        data = Data("train.tsv", source="en", target="de", tokenizer=Character(), target_tokenizer=own)
        tokenizers = train_tokenizers(data, tmp_path)
        assert tokenizers.joint == (own is None)
        assert tokenizers.source.size == 5 + len(set("catdog" if own else "catdogK AE TD AO G"))
        if own:
            assert tokenizers.target.pieces(tokenizers.target.encode("D AE T")) == ["D", "AE", "T"]
        folder = tmp_path / str(own)
        tokenizers.save(folder)
        assert (folder / "target_tokenizer.json").exists() == (own is not None)
        loaded = Tokenizers.load(folder, joint=own is None)
        assert loaded.joint == tokenizers.joint
        assert loaded.target.encode("D AE T") == tokenizers.target.encode("D AE T")


def test_parallel_gzip_files_give_the_batches_of_a_table(tmp_path: Path) -> None:
    rows = pairs(30)
    data, tokenizers = setup(tmp_path, rows, max_tokens=30)
    for i, side in enumerate(("en", "de")):
        (tmp_path / f"train.{side}.gz").write_bytes(gzip.compress("\n".join(row[i] for row in rows).encode()))
    plain = load({**dump(data), "train": ["train.en.gz", "train.de.gz"]}, Data)
    for a, b, _ in zip(
        TrainingBatches(data, tokenizers, 64, base=tmp_path),
        TrainingBatches(plain, tokenizers, 64, base=tmp_path),
        range(20),
        strict=False,
    ):
        assert same(a, b)


def test_a_fault_in_a_later_pool_is_told_when_it_is_met(tmp_path: Path) -> None:
    data, tokenizers = setup(tmp_path, pairs(20), pool=10, max_tokens=30)
    with (tmp_path / "train.tsv").open("a") as stream:
        stream.write("only one column\n")
    batches = TrainingBatches(data, tokenizers, 64, base=tmp_path)
    with pytest.raises(QkvError, match=r"train\.tsv line 22: expected 2 columns"):
        for _ in range(100):
            next(batches)
