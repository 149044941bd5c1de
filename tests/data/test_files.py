"""Records from files, and the sentence that each bad file gets."""

import gzip
import json
import re
import tracemalloc
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qkv.data.files import Record, read
from qkv.errors import QkvError

PAIRS = [("a dog", "ein Hund"), ('say "hi", Tom', "sag „hi“"), ("我爱你", "ich\u2028liebe dich"), ("", " spaces ")]


def put(path: Path, content: str | bytes) -> Path:
    """A file with this text, packed where its name ends in .gz, or with these bytes."""
    if isinstance(content, str):
        content = gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode()
    path.write_bytes(content)
    return path


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def tsv() -> str:
    return "de\tid\ten\n" + "".join(f"{de}\t{i}\t{en}\n" for i, (en, de) in enumerate(PAIRS))


def csv() -> str:
    return "de,en\r\n" + "".join(f"{quoted(de)},{quoted(en)}\r\n" for en, de in PAIRS)


def jsonl() -> str:
    return "".join(json.dumps({"en": en, "more": [1], "de": de}) + "\n" for en, de in PAIRS)


@pytest.mark.parametrize("pack", ["", ".gz"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_a_table_gives_the_columns_asked_for_in_their_order(tmp_path: Path, kind: str, pack: str) -> None:
    content = {"tsv": tsv, "csv": csv, "jsonl": jsonl}[kind]()
    path = put(tmp_path / f"pairs.{kind}{pack}", content)
    first = 1 if kind == "jsonl" else 2
    assert list(read(path, ["en", "de"])) == [Record(pair, path, first + i) for i, pair in enumerate(PAIRS)]
    assert [record.values for record in read(path, ["de"])] == [(de,) for _, de in PAIRS]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    en, de = map(list, zip(*PAIRS, strict=True))
    table = pyarrow.table({"de": de, "n": range(4), "en": pyarrow.array(en).dictionary_encode()})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    assert list(read(path, ["en", "de"])) == [Record(pair, path, i) for i, pair in enumerate(PAIRS, 1)]


@pytest.mark.parametrize("pack", ["", ".gz"])
def test_plain_files_side_by_side_and_one_after_another(tmp_path: Path, pack: str) -> None:
    en = put(tmp_path / f"train.en{pack}", "\n".join(en for en, _ in PAIRS) + "\n")
    de = put(tmp_path / f"train.de{pack}", "\r\n".join(de for _, de in PAIRS))
    pairs = read([f"train.en{pack}", f"train.de{pack}"], ["en", "de"], base=tmp_path)
    assert list(pairs) == [Record(pair, en, i) for i, pair in enumerate(PAIRS, 1)]
    texts = [put(tmp_path / f"{i}.txt{pack}", f"{i}\n\nlast") for i in range(2)]
    found = list(read(texts, ["text"]))
    assert [record.values[0] for record in found] == ["0", "", "last", "1", "", "last"]
    assert [(record.path, record.line) for record in found[2:4]] == [(texts[0], 3), (texts[1], 1)]
    assert [record.values for record in read(de, ["de"])] == [(de,) for _, de in PAIRS]


def test_tables_one_after_another_and_from_a_place_on(tmp_path: Path) -> None:
    put(tmp_path / "a.tsv", "x\ty\n1\t2\n3\t4\n")
    put(tmp_path / "b.jsonl", '{"y": "6", "x": "5"}\n\n')
    rows = [("1", "2"), ("3", "4"), ("5", "6")]
    for start in range(5):
        found = read(["a.tsv", "b.jsonl"], ["x", "y"], start=start, base=tmp_path)
        assert [record.values for record in found] == rows[start:]


def test_a_csv_field_may_hold_line_ends_and_lines_are_still_known(tmp_path: Path) -> None:
    path = put(tmp_path / "a.csv", '\ufeffx,y\n"one\ntwo",3\n\n4,5\n')
    assert list(read(path, ["x", "y"])) == [Record(("one\ntwo", "3"), path, 2), Record(("4", "5"), path, 5)]


def test_a_quote_means_nothing_in_tsv(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", 'x\ty\n"open\tnever closed\n')
    assert next(read(path, ["x", "y"])).values == ('"open', "never closed")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    for name in ("big.tsv", "big.tsv.gz", "big.csv", "big.jsonl"):
        row = '{"x": "' + "b" * 1000 + '"}\n' if name == "big.jsonl" else "b" * 1000 + "\n"
        path = put(tmp_path / name, ("" if name == "big.jsonl" else "x\n") + row * 5000)
        tracemalloc.start()
        assert sum(1 for _ in read(path, ["x"])) == 5000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000, f"{name}: {peak} of 5,000,000 bytes"


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", b"good\n\xff\n")
    assert next(read(path, ["text"])).values == ("good",)


PACKED = gzip.compress(b"en\tde\n" + bytes(range(65, 91)) * 500 + b"\t\n")

BAD: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.tsv", "", "a.tsv is empty"),
    "empty gzip": ("a.jsonl.gz", "", "a.jsonl.gz is empty"),
    "no rows": ("a.tsv", "en\tde\n", "a.tsv has a header and no rows"),
    "blank lines only": ("a.jsonl", "\n \n", "a.jsonl holds no records"),
    "not UTF-8": ("a.tsv", b"en\tde\nx\tgr\xfc\xdfe\n", "a.tsv line 2: byte 5 (0xfc) is not UTF-8"),
    "UTF-16": ("a.csv", "en,de\n1,2\n".encode("utf-16"), "a.csv line 1: byte 1 (0xff) is not UTF-8"),
    "no such column": ("a.tsv", "en\tger\nx\ty\n", "a.tsv line 1 names no column 'de'; there are: en, ger"),
    "nearly a column": ("a.csv", "en,dee\nx,y\n", "a.csv line 1 names no column 'de'; did you mean 'dee'?"),
    "no header": ("a.tsv", "Hi.\tHallo.\nYes.\tJa.\n", "there are: Hi., Hallo."),
    "twice the column": ("a.tsv", "en\tde\tde\nx\ty\tz\n", "names the column 'de' more than once"),
    "narrow row": ("a.tsv", "en\tde\nx\ty\nz\n", "a.tsv line 3: expected 2 columns, as the header has; found 1"),
    "wide row": ("a.csv", "en,de\nx,y,z\n", "a.csv line 2: expected 2 columns, as the header has; found 3"),
    "open quote": ("a.csv", 'en,de\nx,y\n"z,w\n', "a.csv line 3: not CSV (unexpected end of data)"),
    "not JSON": ("a.jsonl", '{"en": "x", "de": "y"}\n{"en": \n', "a.jsonl line 2: not JSON"),
    "deep JSON": ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl line 1: not JSON"),
    "no object": ("a.jsonl", '["x", "y"]\n', "a.jsonl line 1: expected an object with the keys 'en', 'de'"),
    "no key": ("a.jsonl", '{"en": "x", "dee": "y"}\n', "a.jsonl line 1: the key 'de' is missing; did you mean 'dee'?"),
    "a number": ("a.jsonl", '{"en": "x", "de": 3}\n', "a.jsonl line 1: 'de' is 3; text is expected"),
    "null": ("a.jsonl", '{"en": null, "de": "y"}\n', "a.jsonl line 1: 'en' is null; text is expected"),
    "half a character": ("a.jsonl", '{"en": "\\ud83d", "de": ""}\n', "a.jsonl line 1: 'en' holds half of a surrogate"),
    "not gzip": ("a.tsv.gz", b"en\tde\nx\ty\n", "a.tsv.gz is no sound gzip file"),
    "cut gzip": ("a.tsv.gz", PACKED[:-30], "a.tsv.gz is cut off after line"),
    "damaged gzip": ("a.tsv.gz", PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:], "a.tsv.gz is no sound gzip file"),
    "not Parquet": ("a.parquet", "PAR1 or not", "a.parquet is no sound Parquet file"),
    "unknown ending": ("a.xlsx", "x", "the ending '.xlsx' is not known; a table ends in .tsv, .csv, .jsonl, .parquet"),
    "no ending": ("a", "x", "a: the ending '' is not known"),
    "one plain file": ("a.txt", "x\n", "plain text needs one file for each of the columns 'en', 'de'; found 1: a.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_sentence(tmp_path: Path, name: str) -> None:
    file, content, sentence = BAD[name]
    path = put(tmp_path / file, content)
    with pytest.raises(QkvError, match=re.escape(sentence)) as caught:
        list(read(path, ["en", "de"]))
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_plain_file(tmp_path: Path) -> None:
    with pytest.raises(QkvError, match=r"a\.txt is empty"):
        list(read(put(tmp_path / "a.txt", ""), ["text"]))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    put(tmp_path / "train.tsv", "x\n1\n")
    with pytest.raises(QkvError, match=r"trian\.tsv does not exist; did you mean 'train\.tsv'\?"):
        read("trian.tsv", ["x"], base=tmp_path)
    with pytest.raises(QkvError, match=r"zzz\.json does not exist$"):
        read("zzz.json", ["x"], base=tmp_path)
    with pytest.raises(QkvError, match="does not exist, and neither does its directory"):
        read("data/train.tsv", ["x"], base=tmp_path)
    with pytest.raises(QkvError, match="is a directory; a file is expected"):
        read(tmp_path, ["x"])
    with pytest.raises(QkvError, match="no file was given to read 'x' from"):
        read([], ["x"])


def test_parallel_files_of_different_length_name_both(tmp_path: Path) -> None:
    put(tmp_path / "a.en", "1\n2\n3\n")
    put(tmp_path / "a.de", "1\n2\n")
    for files, columns in ([("a.en", "a.de"), ("en", "de")], [("a.de", "a.en"), ("de", "en")]):
        with pytest.raises(QkvError, match=r"a\.de ends after line 2 while .*a\.en goes on"):
            list(read(files, columns, base=tmp_path))


def test_plain_files_in_the_wrong_order_or_mixed_with_tables(tmp_path: Path) -> None:
    for name in ("a.en", "a.de", "a.tsv"):
        put(tmp_path / name, "en\n")
    with pytest.raises(QkvError, match=r"a\.de: the ending '\.de' is not known.*for the column 'en', in \.en"):
        read(["a.de", "a.en"], ["en", "de"], base=tmp_path)
    with pytest.raises(QkvError, match=r"cannot be read together: a\.tsv, a\.de"):
        read(["a.tsv", "a.de"], ["en", "de"], base=tmp_path)


def test_parquet_columns_and_values_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"en": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(QkvError, match=r"a\.parquet has no column 'de'; there are: en, n"):
        list(read(path, ["de"]))
    with pytest.raises(QkvError, match=r"a\.parquet row 2: 'en' is null; text is expected"):
        list(read(path, ["en"]))
    with pytest.raises(QkvError, match=r"a\.parquet row 1: 'n' is 1; text is expected"):
        list(read(path, ["n"]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(QkvError, match=r"a\.parquet is no sound Parquet file"):
        list(read(path, ["en"]))


def test_a_cut_gzip_gives_what_came_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"line\n" * 100_000)[:-12])
    assert len(list(islice(read(path, ["text"]), 1000))) == 1000


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.csv",
            "en;de\nA cat.;Eine Katze.\n",
            "it looks separated by semicolons: a .tsv",
        ),
        ("a.tsv", "en,de\nA cat.,Eine Katze.\n", "it looks separated by commas"),
        ("a.tsv", "english\tgerman\nA cat.\tEine Katze.\n", "the first line names the columns, and data.source, "),
    ],
)
def test_a_table_that_names_other_columns_says_what_may_be_meant(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(QkvError, match=words):
        list(read(tmp_path / name, ("en", "de")))


def test_two_names_in_one_string_are_told_to_be_a_list(tmp_path):
    with pytest.raises(QkvError, match=r"several files are a list: \['a.en', 'a.de'\]"):
        list(read("a.en,a.de", ("en", "de"), base=tmp_path))
