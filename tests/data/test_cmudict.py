"""The pronouncing dictionary as pairs."""

import hashlib
from pathlib import Path

import pytest

from qkv.data.cmudict import write_pairs
from qkv.data.files import read
from qkv.errors import QkvError

ENTRIES = """'bout B AW1 T
a AH0
a(2) EY1
a. EY1
aalborg AO1 L B AO0 R G # place, danish
aalborg(2) AA1 L B AO0 R G
ab-lib AE1 B
record R AH0 K AO1 R D
record(2) R EH1 K ER0 D
record(3) R IH0 K AO1 R D
record(4) R IH1 K AO0 R D
'
3d TH R IY1 D IY2
"""


def test_every_word_with_its_variants_goes_to_one_file(tmp_path: Path) -> None:
    # 400 made-up words, so that each file has some
    made = [f"{a}{b}z" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    dictionary = tmp_path / "cmudict.dict"
    entries = ENTRIES.replace("'\n", "") + "".join(f"{word} Z IY1\n{word}(2) Z EH1\n" for word in made)
    dictionary.write_text(entries, encoding="utf-8")
    counts = write_pairs(dictionary, tmp_path / "pairs")
    rows = {
        split: [record.values for record in read(tmp_path / "pairs" / f"{split}.tsv", ["word", "sounds"])]
        for split in ("train", "valid", "test")
    }
    everything = sorted(row for split in rows.values() for row in split)
    expected = [
        ("'bout", "B AW T"),
        ("a", "AH"),
        ("a", "EY"),
        ("aalborg", "AO L B AO R G"),
        ("aalborg", "AA L B AO R G"),
    ]
    expected += [("record", "R AH K AO R D"), ("record", "R EH K ER D"), ("record", "R IH K AO R D")]
    expected += [(word, sounds) for word in made for sounds in ("Z IY", "Z EH")]
    assert everything == sorted(expected)
    for split, found in rows.items():
        words = {word for word, _ in found}
        assert counts[split] == len(words) > 0
        for word in words:
            part = int.from_bytes(hashlib.sha256(word.encode()).digest(), "big") % 100
            assert split == ("test" if part in range(5) else "valid" if part in (5, 6) else "train")
    before = {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir()}
    write_pairs(dictionary, tmp_path / "pairs")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "pairs").iterdir()}
    assert set(before) == {"train.tsv", "valid.tsv", "test.tsv"}


@pytest.mark.parametrize("line", ["kitten", "kitten k ih t", "KITTEN  K IH1 T", "'", "kitten(2)K IH1", ""])
def test_a_line_that_is_no_entry(tmp_path: Path, line: str) -> None:
    dictionary = tmp_path / "cmudict.dict"
    dictionary.write_text(f"a AH0\n{line}\n", encoding="utf-8")
    with pytest.raises(QkvError, match=r"cmudict\.dict line 2: expected a word and its phones"):
        write_pairs(dictionary, tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()
