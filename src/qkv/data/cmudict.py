"""The CMU pronouncing dictionary as pairs of a word and its sounds: kitten is K IH T AH N."""

import hashlib
import re
from pathlib import Path

from qkv.checkpoints.whole import write_text
from qkv.data.files import read
from qkv.errors import QkvError

# The word, the number of the variant, the phones with their stress, a comment.
_ENTRY = re.compile(r"([^\s(#]+)(?:\(\d+\))? ([A-Z]+[0-2]?(?: [A-Z]+[0-2]?)*)(?: *#.*)?")
_SPELT = re.compile(r"[a-z']*[a-z][a-z']*")


def write_pairs(dictionary: Path, folder: Path) -> dict[str, int]:
    """Write train.tsv, valid.tsv and test.tsv with the columns `word` and `sounds` from the file cmudict.dict.

    Sounds are the 39 phones, set apart by spaces and without stress, as in the published word error rates. A variant
    is one more row of its word, unless it differs in stress only; words with other signs than a to z and ' are left
    out. A word goes to its file with all its variants, by its SHA-256 modulo 100: 0 to 4 to test, 5 and 6 to valid.
    Each file is written whole or not at all, train.tsv last: where it stands, the others do. Returns the number of
    words, by the name of the file: a word with variants counts once.
    """
    pairs: dict[str, dict[tuple[str, str], None]] = {"test": {}, "valid": {}, "train": {}}
    for record in read(dictionary, ["dict"]):
        entry = _ENTRY.fullmatch(record.values[0])
        if entry is None:
            raise QkvError(
                f"{dictionary} line {record.line}: expected a word and its phones, as in 'kitten K IH1 T AH0 N', "
                f"found {record.values[0][:40]!r}"
            )
        word, phones = entry.groups()
        if _SPELT.fullmatch(word):
            pairs[_split(word)][word, re.sub(r"\d", "", phones)] = None
    for split, rows in pairs.items():
        table = "".join(f"{word}\t{sounds}\n" for word, sounds in rows)
        write_text(folder / f"{split}.tsv", "word\tsounds\n" + table)
    return {split: len({word for word, _ in rows}) for split, rows in pairs.items()}


def _split(word: str) -> str:
    part = int(hashlib.sha256(word.encode()).hexdigest(), 16) % 100
    return "test" if part < 5 else "valid" if part < 7 else "train"
