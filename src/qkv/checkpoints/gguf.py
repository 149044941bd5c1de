"""GGUF version 3, llama.cpp's file of a model, read in place.

    file    =  "GGUF" · version u32 · how many tensors u64 · how many pairs u64 · pair … · entry … · padding · data
    pair    =  key string · type u32 · value           a number, a bool of one byte, a string or an array
    string  =  length u64 · UTF-8                      array = type u32 · count u64 · value …
    entry   =  name string · how many dimensions u32 · dimension u64 … · type u32 · offset u64 into the data

All numbers are little-endian; dimensions run from the fastest one, the reverse of torch's. The data begins, and each
tensor in it, at a multiple of the alignment: the pair general.alignment, else 32.

A file is not trusted: every length is compared with what is left of the file before anything is read or made by it.
"""

import mmap
import struct
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.blocks import dequantise, size, type_name
from qkv.ops.blocks.layout import FLOATS
from qkv.spec import nearest

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32

# The types of a value in the order of their numbers, and the codes of numbers in the struct module.
CODES = {
    "uint8": "B",
    "int8": "b",
    "uint16": "H",
    "int16": "h",
    "uint32": "I",
    "int32": "i",
    "float32": "f",
    "bool": "B",
    "string": "",
    "array": "",
    "uint64": "Q",
    "int64": "q",
    "float64": "d",
}
TYPES = list(CODES)

# What the format allows.
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 65_535, 64, 4

# What no sound file reaches, so that a hostile one costs little: the largest vocabulary known, of 262,144 tokens with
# their scores, types and merges, is 1.3 million values in 18 MB.
MOST_ENTRIES, MOST_VALUES, LONGEST_HEADER = 65_536, 1_700_000, 48_000_000


def is_gguf(path: Path) -> bool:
    """Whether a path is called as such files are."""
    return path.suffix.lower() == ".gguf"


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file: its shape in torch's order, its type, and the bytes [offset, offset + nbytes) it takes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUF:
    """A GGUF file: `metadata` as plain Python values, `tensors` by name, and their bytes and weights.

    The file is mapped, not read; what is given out are views of the map while nothing must be computed. Writing into
    a view changes this process's copy of the page and never the file. Strings inside arrays that are not UTF-8 have
    the replacement character in the wrong places, since vocabularies may hold pieces of characters; all others must
    be UTF-8. Raises QkvError for any file that is not whole and sound.
    """

    tensors: dict[str, GGUFTensor]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map = mapped(self.path)
        header = _Header(self.path, self._map)
        tensors, pairs = header.start()
        self.metadata = header.metadata(pairs)
        self.tensors = header.tensors(tensors, header.alignment(self.metadata))

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The pairs; after `release` they are read anew."""
        header = _Header(self.path, self._map)
        return header.metadata(header.start()[1])

    def data(self, name: str) -> Tensor:
        """A tensor's bytes in the file: uint8, flat, a view."""
        entry = self._entry(name)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor's weights; a view where the file holds `dtype` already."""
        entry, data = self._entry(name), self.data(name)
        try:
            weights = dequantise(entry.type, data, entry.shape, dtype)
        except QkvError as fault:
            raise QkvError(f"{self.path}: tensor {name!r}: {fault}") from None
        if weights.untyped_storage().data_ptr() != data.untyped_storage().data_ptr():
            self._release(entry.offset, entry.offset + entry.nbytes)
        return weights

    def release(self) -> None:
        """Give back the memory of the metadata and of tensors in blocks, which are read anew where they are used."""
        self.__dict__.pop("metadata", None)
        self._release(0, min((entry.offset for entry in self.tensors.values()), default=0))
        for entry in self.tensors.values():
            if entry.type not in FLOATS:  # of those, parts of a model may be views that have been written to
                self._release(entry.offset, entry.offset + entry.nbytes)

    def _release(self, start: int, end: int) -> None:
        """Give back the memory of whole pages of the file, which the system would read again from there."""
        page = mmap.PAGESIZE
        start, end = aligned(start, page), end // page * page
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _entry(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise QkvError(f"{self.path} holds no tensor {name!r}{nearest(name, self.tensors)}")
        return self.tensors[name]


def mapped(path: Path) -> mmap.mmap:
    """The bytes of a file, as a map that tensors can view: private and writable, since torch knows no read-only."""
    if not path.is_file():
        raise QkvError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        with path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise QkvError(f"{path} is empty: copy it again") from None
    except OSError as fault:
        raise QkvError(f"{path} cannot be read: {fault.strerror}") from None


def aligned(at: int, alignment: int) -> int:
    """The first multiple of the alignment from `at` on."""
    return -(-at // alignment) * alignment


def is_alignment(value: object) -> bool:
    """Whether a value can be an alignment: a power of two that is a multiple of 8."""
    return type(value) is int and value >= 8 and value & (value - 1) == 0


class _Header:
    """What stands before the data, read from front to back."""

    def __init__(self, path: Path, source: mmap.mmap) -> None:
        self.path, self.source, self.at = path, source, 0
        self.values = 0

    def fault(self, what: str) -> QkvError:
        return QkvError(f"{self.path}: {what}")

    def take(self, length: int, what: str) -> int:
        """Where the next `length` bytes begin, once it is sure that they are there."""
        start, self.at = self.at, self.at + length
        if self.at > len(self.source):
            raise self.fault(f"the file ends inside {what}, which would reach byte {self.at} of {len(self.source)}")
        if self.at > LONGEST_HEADER:
            raise self.fault(f"{what} would reach byte {self.at}, metadata may take {LONGEST_HEADER}")
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from(f"<{code}", self.source, self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str, longest: int = LONGEST_HEADER) -> str:
        length = self.number("Q", what)
        if length > longest:
            raise self.fault(f"{what} is {length} bytes long, at most {longest} are allowed")
        start = self.take(length, what)
        try:
            return str(self.source[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8") from None

    def start(self) -> tuple[int, int]:
        """How many tensors and pairs follow."""
        magic = self.source[:4]
        if magic != MAGIC:
            raise self.fault(f"this is not a GGUF file: it begins with {magic!r}, not with {MAGIC!r}")
        self.take(4, "the start")
        version = self.number("I", "the version")
        if version == VERSION << 24:
            raise self.fault("the file is big-endian: convert the model anew on, or for, a little-endian machine")
        if version in (1, 2):
            raise self.fault(f"the file has GGUF version {version}, which is outdated: convert the model anew")
        if version != VERSION:
            raise self.fault(f"the file has GGUF version {version}, only version {VERSION} is known")
        tensors, pairs = self.number("Q", "the counts"), self.number("Q", "the counts")
        for count, what in ((tensors, "tensors"), (pairs, "pairs of metadata")):
            if count > MOST_ENTRIES:
                raise self.fault(f"the file claims {count} {what}, at most {MOST_ENTRIES} are allowed")
        return tensors, pairs

    def metadata(self, pairs: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i in range(pairs):
            key = self.string(f"key {i} of the metadata", LONGEST_KEY)
            if key in found:
                raise self.fault(f"the key {key!r} stands twice in the metadata")
            found[key] = self.value(f"the value of {key!r}")
        return found

    def type(self, what: str) -> str:
        number = self.number("I", what)
        if number >= len(TYPES):
            raise self.fault(f"{what} has the unknown type {number}")
        return TYPES[number]

    def value(self, what: str) -> Any:
        type = self.type(what)
        if type == "string":
            return self.string(what)
        if type != "array":
            return self.numbers(type, 1, what)[0]
        type, count = self.type(what), self.number("Q", what)
        self.values += count
        if self.values > MOST_VALUES:
            raise self.fault(f"{what} is an array of {count}, all arrays together may hold {MOST_VALUES} values")
        if type == "array":
            raise self.fault(f"{what} is an array of arrays, which is not supported")
        return self.strings(count, what) if type == "string" else self.numbers(type, count, what)

    def numbers(self, type: str, count: int, what: str) -> list[Any]:
        form = f"<{count}{CODES[type]}"
        numbers = list(struct.unpack_from(form, self.source, self.take(struct.calcsize(form), what)))
        if type != "bool":
            return numbers
        if max(numbers, default=0) > 1:
            raise self.fault(f"{what} is a bool of {max(numbers)}, only 0 and 1 are allowed")
        return [number == 1 for number in numbers]

    def strings(self, count: int, what: str) -> list[str]:
        self.at = self.take(8 * count, what)  # each has a length at least, so this much must be there
        source, at, strings = self.source, self.at, []
        end, length = min(len(source), LONGEST_HEADER), struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + length(source, at)[0] if start <= end else start
            if at > end:
                self.take(at - self.at, what)
            strings.append(str(source[start:at], "utf-8", "replace"))
        self.at = at
        return strings

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get(ALIGNMENT_KEY, ALIGNMENT)
        if not is_alignment(value):
            raise self.fault(f"{ALIGNMENT_KEY} is {value!r}, not a power of two from 8 on")
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        entries = [self.entry(f"entry {i} of the tensors") for i in range(count)]
        start = aligned(self.at, alignment)
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type, offset in entries:
            if name in tensors:
                raise self.fault(f"the tensor {name!r} stands twice in the file")
            if offset % alignment:
                raise self.fault(f"tensor {name!r} has the offset {offset}, not a multiple of {alignment}")
            tensor = GGUFTensor(name, shape, type, start + offset, self.size(name, type, shape))
            end = tensor.offset + tensor.nbytes
            if end > len(self.source):
                raise self.fault(f"tensor {name!r} would reach byte {end} of {len(self.source)}: copy the file again")
            tensors[name] = tensor
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for one, next in pairwise(in_order):
            if one.offset + one.nbytes > next.offset:
                raise self.fault(f"the tensors {one.name!r} and {next.name!r} overlap")
        return tensors

    def entry(self, what: str) -> tuple[str, tuple[int, ...], str, int]:
        name = self.string(what, LONGEST_NAME)
        what = f"the entry of tensor {name!r}"
        dimensions = self.number("I", what)
        if dimensions > MOST_DIMENSIONS:
            raise self.fault(f"tensor {name!r} has {dimensions} dimensions, at most {MOST_DIMENSIONS} are allowed")
        shape = tuple(self.number("Q", what) for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self.fault(f"tensor {name!r} has the shape {shape}, in which nothing can stand")
        return name, shape, type_name(self.number("I", what)), self.number("Q", what)

    def size(self, name: str, type: str, shape: tuple[int, ...]) -> int:
        try:
            return size(type, shape)
        except QkvError as fault:
            raise self.fault(f"tensor {name!r}: {fault}") from None
