"""GGUF version 3, written; `qkv.checkpoints.gguf` says what the file looks like."""

import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from torch import Tensor

from qkv.checkpoints.gguf import (
    ALIGNMENT,
    ALIGNMENT_KEY,
    CODES,
    LONGEST_KEY,
    LONGEST_NAME,
    MAGIC,
    MOST_DIMENSIONS,
    TYPES,
    VERSION,
    aligned,
    is_alignment,
)
from qkv.checkpoints.whole import whole_file
from qkv.errors import QkvError
from qkv.ops.blocks import BLOCKS, quantise


@dataclass(frozen=True)
class Typed:
    """A value of metadata with a type of the format's choice, or a list of such: Typed("int32", [1, 3, 1])."""

    type: str
    value: Any


def write_gguf(path: Path | str, metadata: Mapping[str, Any], tensors: Iterable[tuple[str, str, Tensor]]) -> None:
    """Write a GGUF file, whole or not at all, from metadata and tensors as (name, type, weights).

    A bool, a string and a float (as float32) have one type; an int is uint32, int32 if negative, and 64 bits wide if
    32 are too few; a list has one such type for all its elements; `Typed` says another. Tensors are taken one at a
    time and quantised as `qkv.ops.blocks.quantise` does, so a generator may make each when it is asked for: the bytes
    wait in a file beside `path` until all entries, which stand before them, are known. general.alignment is honoured.
    Raises QkvError naming the file, and the key or tensor that cannot be written.
    """
    path = Path(path)
    pairs = b"".join(_pair(path, key, value) for key, value in metadata.items())
    alignment = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
    if not is_alignment(alignment):
        raise QkvError(f"{path}: {ALIGNMENT_KEY} is {alignment!r}, not a power of two from 8 on")
    with whole_file(path) as part, TemporaryFile(dir=path.parent) as data:
        entries: dict[str, bytes] = {}
        for name, type, weights in tensors:
            if name in entries:
                raise QkvError(f"{path}: the tensor {name!r} is given twice")
            entries[name] = _entry(path, name, type, weights.shape, data.tell())
            try:
                data.write(quantise(type, weights).view(-1).numpy().data)
            except QkvError as fault:
                raise QkvError(f"{path}: tensor {name!r}: {fault}") from None
            _pad(data, alignment)
        with part.open("wb") as file:
            file.write(struct.pack("<4sIQQ", MAGIC, VERSION, len(entries), len(metadata)))
            file.write(pairs + b"".join(entries.values()))
            _pad(file, alignment)
            data.seek(0)
            shutil.copyfileobj(data, file, 1 << 22)


def _pad(file: IO[bytes], alignment: int) -> None:
    file.write(bytes(aligned(file.tell(), alignment) - file.tell()))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(path: Path, name: str, type: str, shape: Sequence[int], offset: int) -> bytes:
    # llama.cpp keeps a name with a zero behind it in as many bytes as the format allows for the name alone.
    if not 0 < len(name.encode()) < LONGEST_NAME:
        raise QkvError(f"{path}: the tensor's name {name!r} must have from 1 to {LONGEST_NAME - 1} bytes")
    if type not in BLOCKS:
        raise QkvError(f"{path}: tensor {name!r} has the unknown type {type!r}: use {', '.join(BLOCKS)}")
    if len(shape) > MOST_DIMENSIONS or 0 in shape:
        raise QkvError(
            f"{path}: tensor {name!r} has the shape {tuple(shape)}; the format has at most {MOST_DIMENSIONS} "
            "dimensions, none of them 0"
        )
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _string(name) + dimensions + struct.pack("<IQ", BLOCKS[type].id, offset)


def _pair(path: Path, key: str, value: Any) -> bytes:
    try:
        if not 0 < len(key.encode()) <= LONGEST_KEY:
            raise QkvError(f"a key must have from 1 to {LONGEST_KEY} bytes")
        return _string(key) + _value(value)
    except (QkvError, struct.error, OverflowError, UnicodeEncodeError) as fault:
        raise QkvError(f"{path}: the metadata {key[:80]!r} cannot be written: {fault}") from None


def _value(value: Any) -> bytes:
    typed = value if isinstance(value, Typed) else Typed(_type(_elements(value)), value)
    elements = _elements(typed.value)
    packed = _pack(typed.type, elements)
    number = struct.pack("<I", TYPES.index(typed.type))
    if not isinstance(typed.value, list):
        return number + packed
    return struct.pack("<I", TYPES.index("array")) + number + struct.pack("<Q", len(elements)) + packed


def _elements(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _type(elements: list[Any]) -> str:
    """The type that plain values of Python are written as."""
    kinds = {type(element) for element in elements}
    if kinds == {int}:
        low, high = min(elements), max(elements)
        wide = low < -(2**31) or high >= (2**32 if low >= 0 else 2**31)
        return ("int" if low < 0 else "uint") + ("64" if wide else "32")
    for kind, name in ((bool, "bool"), (float, "float32"), (str, "string")):
        if kinds == {kind}:
            return name
    found = " and ".join(sorted(kind.__name__ for kind in kinds)) or "an empty list"
    raise QkvError(f"its type does not follow from {found}; use Typed(type, value)")


def _pack(type: str, elements: list[Any]) -> bytes:
    expected = {"string": str, "bool": bool}.get(type, int | float)
    for element in elements:
        if not isinstance(element, expected):
            raise QkvError(f"{element!r} is no {type}")
    if type == "string":
        return b"".join(map(_string, elements))
    if not CODES.get(type):
        raise QkvError(f"there is no type {type!r} of numbers, bools or strings")
    return struct.pack(f"<{len(elements)}{CODES[type]}", *elements)
