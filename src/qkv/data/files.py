"""Records from files: .tsv, .csv, .jsonl, .parquet and plain text, each but Parquet also with .gz.

Files are read one line (Parquet: one group of rows) at a time, so a file may be larger than memory. A line ends at
`\\n` or `\\r\\n` and nowhere else: U+2028 and its like are content.
"""

import csv
import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

from qkv.errors import QkvError
from qkv.spec import Spec, nearest


@dataclass(frozen=True, slots=True)
class Record:
    """One example: the text of each column asked for, and where it stands (Parquet: `line` is the row)."""

    values: tuple[str, ...]
    path: Path
    line: int


class Synthetic(Spec):
    """Texts that are drawn by a rule: it stands where a file of running text may stand."""

    def texts(self) -> Iterator[str]:
        """The same ones each time."""
        raise AssertionError(f"{type(self).__name__} does not say what it draws")

    def records(self, columns: Sequence[str]) -> Iterator[Record]:
        """Each text is a document of one line."""
        if len(columns) > 1:
            raise QkvError(f"{self.kind} gives running text; name the column text, not {_quoted(columns)}")
        return (Record((text,), Path(self.kind), 1) for text in self.texts())


def read(
    paths: str | Path | Sequence[str | Path] | Synthetic,
    columns: Sequence[str],
    *,
    start: int = 0,
    base: Path = Path(),
) -> Iterator[Record]:
    """The records of one or several files, from number `start` on; relative paths stand in the folder `base`.

    Tables (.tsv and .csv with a header, .jsonl, .parquet) are read one after another and hold every column.
    Plain text has one example a line and is one column: several files stand side by side, one per column and in the
    order of `columns`, or, for a single column, one after another. It ends in .txt or in the name of its column
    (train.en, train.de). That every file exists and has a known ending is checked before the first is read.

    Raises QkvError: a file that is missing, a directory, empty, not UTF-8, damaged or of unknown ending; a missing
    column; a row of another width; parallel files of different length; a value that is not text.
    """
    if isinstance(paths, Synthetic):
        return islice(paths.records(columns), start, None)
    files = [base / path for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if not files:
        raise QkvError(f"no file was given to read {_quoted(columns)} from")
    plain = [is_plain(file) for file in files]
    for file in files:
        _must_exist(file)
    if any(plain):
        _must_be_columns(files, columns, plain)
    if any(plain) and len(columns) > 1:
        records = _parallel(files, columns)
    else:
        records = chain.from_iterable(_READERS.get(_ending(file), _plain)(file, columns) for file in files)
    return islice(records, start, None)


def is_plain(path: str | Path) -> bool:
    """Whether a path is plain text, whose lines are parts of one document, and not a table of documents."""
    return _ending(Path(path)) not in _READERS


# --- what is asked for --------------------------------------------------------------------------------------------


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _must_exist(path: Path) -> None:
    if path.is_dir():
        raise QkvError(f"{path} is a directory; a file is expected")
    if not path.parent.is_dir():
        raise QkvError(f"{path} does not exist, and neither does its directory")
    if not path.exists():
        guess = difflib.get_close_matches(path.name, [file.name for file in path.parent.iterdir()], 1)
        if "," in path.name:
            raise QkvError(f"{path} does not exist; several files are a list: {path.name.split(',')}")
        raise QkvError(f"{path} does not exist" + (f"; did you mean {guess[0]!r}?" if guess else ""))


def _must_be_columns(paths: Sequence[Path], columns: Sequence[str], plain: Sequence[bool]) -> None:
    """Refuse endings that are neither a table's nor plain text, and plain files that do not match the columns."""
    beside = len(columns) > 1
    for i, path in enumerate(paths):
        column = columns[min(i, len(columns) - 1) if beside else 0]
        if plain[i] and _ending(path) not in (".txt", f".{column.lower()}"):
            raise QkvError(
                f"{path}: the ending {_ending(path)!r} is not known; a table ends in {', '.join(_READERS)}, "
                f"plain text in .txt or, for the column {column!r}, in .{column}, each but .parquet also with .gz"
            )
    if not all(plain):
        names = ", ".join(path.name for path in paths)
        raise QkvError(f"plain text and tables cannot be read together: {names}")
    if beside and len(paths) != len(columns):
        raise QkvError(
            f"plain text needs one file for each of the columns {_quoted(columns)}; "
            f"found {len(paths)}: {', '.join(path.name for path in paths)}"
        )


def _quoted(columns: Sequence[str]) -> str:
    return ", ".join(map(repr, columns))


# --- lines --------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file without their ends and without a byte order mark."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                text = line.decode("utf-8").removesuffix("\n").removesuffix("\r")
                yield text if number > 1 else text.removeprefix("\ufeff")
    except UnicodeDecodeError as fault:
        byte = f"byte {fault.start + 1} (0x{fault.object[fault.start]:02x})"
        raise QkvError(f"{path} line {number}: {byte} is not UTF-8; save the file as UTF-8") from None
    except EOFError:
        raise QkvError(f"{path} is cut off after line {number}: the gzip stream has no end; copy it again") from None
    except (gzip.BadGzipFile, zlib.error) as fault:
        raise QkvError(f"{path} is no sound gzip file ({fault}), found after line {number}") from None
    except OSError as fault:
        raise QkvError(f"{path} cannot be read: {fault.strerror}") from None
    if not number:
        raise QkvError(f"{path} is empty")


def _plain(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), 1):
        yield Record((line,), path, number)


def _parallel(paths: Sequence[Path], columns: Sequence[str]) -> Iterator[Record]:
    """Files side by side, one a column; a record says where it stands in the first."""
    for number, lines in enumerate(zip_longest(*map(_lines, paths)), 1):
        if None in lines:
            short = lines.index(None)
            longer = next(path for path, line in zip(paths, lines, strict=True) if line is not None)
            raise QkvError(
                f"{paths[short]} ends after line {number - 1} while {longer} goes on; "
                "files that stand side by side need the same number of lines"
            )
        yield Record(lines, paths[0], number)


# --- tables -------------------------------------------------------------------------------------------------------


def _table(rows: Iterator[tuple[int, list[str]]], path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Records from numbered rows, the first of which names the columns."""
    number, header = next(rows, (1, []))
    picks = []
    for column in columns:
        if column not in header:
            raise QkvError(
                f"{path} line {number} names no column {column!r}{nearest(column, [name[:40] for name in header])}"
                f"{separated(header)}"
            )
        if header.count(column) > 1:
            raise QkvError(f"{path} line {number} names the column {column!r} more than once")
        picks.append(header.index(column))
    records = 0
    for number, row in rows:
        if len(row) != len(header):
            raise QkvError(f"{path} line {number}: expected {len(header)} columns, as the header has; found {len(row)}")
        records += 1
        yield Record(tuple(row[pick] for pick in picks), path, number)
    if not records:
        raise QkvError(f"{path} has a header and no rows")


def separated(header: list[str]) -> str:
    """What may be meant, where the first line names other columns than those that are read."""
    if len(header) == 1:
        for mark, name in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
            if mark in header[0]:
                return f"; it looks separated by {name}: a .tsv is by tabs, a .csv by commas"
    return "; the first line names the columns, and data.source, data.target or data.text those that are read"


def _tsv(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Tab-separated: a tab always ends a field, and a quote is a character like any other."""
    return _table(((n, line.split("\t")) for n, line in enumerate(_lines(path), 1) if line), path, columns)


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    def rows() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader((line + "\n" for line in _lines(path)), strict=True)
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as fault:
                raise QkvError(
                    f"{path} line {number}: not CSV ({fault}); is a quote left open? Very long texts go in .jsonl"
                ) from None
            if row is None:
                return
            if row:
                yield number, row

    return _table(rows(), path, columns)


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    records = 0
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise QkvError(f"{where}: not JSON ({fault})") from None
        if not isinstance(entry, dict):
            raise QkvError(f"{where}: expected an object with the keys {_quoted(columns)}, found {line[:40]!r}")
        for column in columns:
            if column not in entry:
                raise QkvError(f"{where}: the key {column!r} is missing{nearest(column, entry)}")
        records += 1
        yield Record(tuple(_text(entry[column], column, where) for column in columns), path, number)
    if not records:
        raise QkvError(f"{path} holds no records, only blank lines")


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise QkvError(f'{path}: Parquet needs pyarrow; pip install "qkv[parquet]"') from None
    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            for column in columns:
                if column not in names:
                    raise QkvError(f"{path} has no column {column!r}{nearest(column, names)}")
            for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
                texts = [batch.column(column).to_pylist() for column in columns]
                for row in zip(*texts, strict=True):
                    number += 1
                    where = f"{path} row {number}"
                    yield Record(tuple(map(_text, row, columns, (where,) * len(row))), path, number)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as fault:
        raise QkvError(f"{path} is no sound Parquet file, found after row {number} ({fault})") from None
    if not number:
        raise QkvError(f"{path} has no rows")


def _text(value: object, column: str, where: str) -> str:
    """The value itself if it is text; JSON can also spell half a character, which no file or tokeniser can hold."""
    if not isinstance(value, str):
        raise QkvError(f"{where}: {column!r} is {json.dumps(value, default=str)[:40]}; text is expected")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise QkvError(f"{where}: {column!r} holds half of a surrogate pair, which is not text")
    return value


_READERS: dict[str, Callable[[Path, Sequence[str]], Iterator[Record]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
