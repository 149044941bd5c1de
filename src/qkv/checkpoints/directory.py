"""A directory as the transformers package writes it: config.json, and safetensors in one file or several."""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkv.errors import QkvError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm",
    "target.spm", "target_vocab.json", "generation_config.json", "chat_template.jinja", "modules.json",
    "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json", "LICENSE", "NOTICE",
)  # fmt: skip
"""The files beside the weights that go where they go: how text becomes ids and back, how vectors are pooled, terms."""

LARGEST, MOST = 2**24, 2**18
"""Of a JSON text: bytes and values. The index of 100,000 tensors is below both; what is read of a file stays small."""


class Directory:
    """Tensors by the names of the file, mapped into memory: a tensor is read from disk when it is used."""

    single = SINGLE
    """The file of weights, where there is one."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config: dict[str, Any] = read_table(folder / CONFIG)
        self.file_of: dict[str, Any] = {}
        said = self.index()
        files = {name: self.mapped(folder / name) for name in sorted(set(said.values())) or [self.single]}
        for name, file in files.items():
            for key in list(file.keys()):
                if said.get(key, name) != name or key in self.file_of:
                    raise QkvError(
                        f"{folder / name} holds {key!r}, which belongs to another file: copy the folder again"
                    )
                self.file_of[key] = file
        lost = [key for key in said if key not in self.file_of]
        if lost:
            raise QkvError(f"{folder / said[lost[0]]} lacks {lost[0]!r}, which {INDEX} says it holds: copy it again")

    def index(self) -> dict[str, str]:
        """Tensor → file as the index says; empty where there is one file of weights and no index."""
        if (self.path / self.single).is_file():
            return {}
        if not (self.path / INDEX).is_file():
            pickles = sorted([*self.path.glob("*.bin"), *self.path.glob("*.pt"), *self.path.glob("*.pth")])
            if pickles:
                raise QkvError(
                    f"{pickles[0]} is a pickle, which can run code when it is opened; if you trust it, "
                    f"`qkv convert {self.path} NEW --allow-pickle` reads its weights alone and writes safetensors"
                )
            raise QkvError(
                f"{self.path} has no {self.single} beside its {CONFIG}: the folder is incomplete, copy it again"
            )
        names = read_table(self.path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise QkvError(f"{self.path / INDEX} has no table weight_map from tensors to files")
        if not all(is_plain(name) for name in names.values()):
            raise QkvError(f"{self.path / INDEX} names files outside of its folder")
        return names

    def mapped(self, path: Path) -> Any:
        """A file of weights whose header is sound."""
        if not path.is_file():
            raise QkvError(f"{path} does not exist: the folder is incomplete, copy it again")
        try:
            with path.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                if size > LARGEST:
                    raise ValueError(f"its header would have {size:,} bytes")
                parsed(stream.read(size))
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError, ValueError) as fault:
            raise QkvError(f"{path} is damaged or cut off ({str(fault)[:120]}): copy it again") from None

    @property
    def keys(self) -> list[str]:
        return list(self.file_of)

    def tensor(self, key: str) -> Tensor:
        return self.file_of[key].get_tensor(key)

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of most of its tensors."""
        counts = Counter(file.get_slice(key).get_dtype() for key, file in self.file_of.items())
        known = [DTYPES[name] for name, _ in counts.most_common() if name in DTYPES]
        if not known:
            raise QkvError(f"{self.path} holds no tensor of floating-point numbers")
        return known[0]


def is_plain(name: str) -> bool:
    """Whether a name that a file gives can only be that of something in its own folder."""
    whole = name.isprintable() and len(name.encode()) < 256
    return whole and name not in ("", ".", "..") and not set(name) & set("/\\:")


def read_table(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table."""
    found = read_sound(path)
    if not isinstance(found, dict):
        raise QkvError(f"{path} is no table of keys and values")
    return found


def read_sound(path: Path) -> Any:
    """A JSON file that nobody has checked."""
    if not path.is_file():
        raise QkvError(f"{path} does not exist: the folder is incomplete, copy it again")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is longer than {LARGEST:,} bytes")
        return parsed(path.read_bytes())
    except (OSError, ValueError) as fault:
        raise QkvError(f"{path} is not sound JSON ({str(fault)[:120]}): copy it again") from None


def parsed(data: bytes) -> Any:
    """JSON without a key given twice, counted before it is parsed; `ValueError` says what it is not."""
    if sum(map(data.count, (b",", b"[", b"{"))) > MOST:
        raise ValueError(f"it holds more than {MOST:,} values")
    try:
        found = json.loads(data.decode(), object_pairs_hook=unique)
        if b"\\ud" in data.lower():  # half a character could not be written again
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it gives the key {twice!r} twice")
    return found
