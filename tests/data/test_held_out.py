"""A share of the training files that is held out for validation."""

from pathlib import Path

import pytest

from qkv.data import Character, Data, EvaluationBatches, Symbols, records, train_tokenizers, training_records
from qkv.data.batches import TrainingBatches
from qkv.errors import QkvError
from qkv.spec import dump, load


def lines(folder: Path, *texts: str) -> None:
    (folder / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def values(data: Data, files: object, base: Path, start: int = 0) -> list[str]:
    part = training_records(data, base) if files == data.train else records(data, files, base)
    return [record.values[0] for record in part(start)]


def test_the_share_is_of_characters_and_stands_at_the_end(tmp_path):
    lines(tmp_path, "a" * 9, "b" * 49, "c" * 19, "d" * 9, "e" * 9)  # with their ends 10, 50, 20, 10 and 10
    for share, first in ((0.2, 3), (0.21, 3), (0.19, 4), (0.1, 4), (0.4, 2), (0.95, 1)):
        data = Data("a.txt", valid=share, text="text", tokenizer=Character())
        assert load(dump(data), Data) == data
        train, valid = values(data, data.train, tmp_path), values(data, data.valid, tmp_path)
        assert [text[0] for text in train + valid] == list("abcde")
        assert valid[0][0] == "abcde"[first]
        for start in range(6):
            assert values(data, data.train, tmp_path, start) == train[start:]
            assert values(data, data.valid, tmp_path, start) == valid[start:]
    other = Data("a.txt", valid="a.txt", text="text")
    assert values(other, other.train, tmp_path) == values(other, other.valid, tmp_path) == train + valid
    assert [record.values[0] for record in records(data, "a.txt", tmp_path)(0)] == train + valid  # a file is the file


def test_tokenizers_and_batches_see_only_their_part(tmp_path):
    lines(tmp_path, *(["abab" * 5] * 9), "cccc" * 5)
    data = Data("a.txt", valid=0.1, text="text", tokenizer=Character(), context=8, pool=3)
    tokenizers = train_tokenizers(data, tmp_path)
    tokenizer = tokenizers.target
    assert tokenizer.encode("c") == [tokenizer.unknown] and tokenizer.unknown not in tokenizer.encode("ab\n")
    batches = TrainingBatches(data, tokenizers, 32, base=tmp_path)
    said = set()
    while batches.epoch == 0:
        said.update(next(batches).target.flatten().tolist())
    assert tokenizer.unknown not in said
    held = [batch.target for batch in EvaluationBatches(data, data.valid, tokenizers, 32, base=tmp_path)]
    assert sum(int((ids == tokenizer.unknown).sum()) for ids in held) >= 20
    assert not any(bool((ids == tokenizer.encode("a")[0]).any()) for ids in held)


def test_pairs_are_held_out_too(tmp_path):
    rows = [(f"w{n}", f"x{n}") for n in range(20)]
    (tmp_path / "a.tsv").write_text("en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in rows))
    data = Data("a.tsv", valid=0.25, source="en", target="de", tokenizer=Symbols())
    both = training_records(data, tmp_path), records(data, 0.25, tmp_path)
    parts = [[record.values for record in part(0)] for part in both]
    assert parts[0] + parts[1] == rows and len(parts[1]) in (4, 5)


def test_what_cannot_be_held_out_is_refused(tmp_path):
    for share in (0.0, 1.0, -0.1, 2):
        with pytest.raises(QkvError, match="valid is a file or a share between 0 and 1"):
            Data("a.txt", valid=share, text="text")
    lines(tmp_path, "a single line")
    data = Data("a.txt", valid=0.1, text="text")
    for part in (training_records(data, tmp_path), records(data, 0.1, tmp_path)):
        with pytest.raises(QkvError, match=r"a\.txt has 1 record, too few to hold 0\.1 of them out"):
            list(part(0))
