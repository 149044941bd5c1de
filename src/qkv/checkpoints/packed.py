"""Packed weights in safetensors: the bytes of their blocks, and in the file's metadata what is in them.

Such a file holds a model's weights by the model's own names, beside the spec.json of qkv's own form, or beside a
published config.json. There it has a name of its own: of weights that it cannot read another tool would make up random
ones, and of a file that it does not find it says so.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import torch
from torch import Tensor

from qkv.checkpoints.directory import CONFIG, Directory, parsed, read_table
from qkv.errors import QkvError
from qkv.ops.blocks import BLOCKS
from qkv.ops.blocks.packed import Packed

TABLE = "qkv.blocks"
"""The key of the metadata that holds a table, as JSON: the format of each tensor that is packed."""

PACKED = "packed.safetensors"

METHOD: dict[str, Any] = {"quantization_config": {"quant_method": "qkv"}}
"""What a config.json says of such weights."""


def table_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata that says which of some tensors are packed, and how; empty where none is."""
    found = {name: x.format for name, x in tensors.items() if isinstance(x, Packed)}
    return {TABLE: json.dumps(found)} if found else {}


def formats(metadata: Mapping[str, str] | None, names: Collection[str], path: Path) -> dict[str, str]:
    """Name → format, as the metadata of a file with tensors of these names says."""
    text = (metadata or {}).get(TABLE, "{}")
    try:
        found = parsed(text.encode())
    except ValueError as fault:
        raise QkvError(f"{path}: its table of packed weights is not sound JSON ({fault}): copy it again") from None
    wrong = [one for one in (found.values() if isinstance(found, dict) else [found]) if one not in list(BLOCKS)]
    if wrong:
        raise QkvError(f"{path}: its table of packed weights says {shown(wrong[0])}, which is no format of blocks")
    lost = [name for name in found if name not in names]
    if lost:
        raise QkvError(f"{path} lacks {shown(lost[0])}, which its table of packed weights names: copy it again")
    return found


def as_packed(name: str, blocks: Tensor, format: str, dtype: torch.dtype, path: Path) -> Packed:
    """The weights whose blocks a file holds."""
    try:
        if blocks.dim() < 2:
            raise QkvError(f"its shape is {tuple(blocks.shape)}")
        return Packed(format, blocks, dtype)
    except QkvError as fault:
        raise QkvError(f"{path}: {name!r} is no matrix in blocks of {format} ({fault}): copy it again") from None


def repacked(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None, path: Path) -> dict[str, Tensor]:
    """The tensors of a file, those in its table packed; computing goes on in the dtype of most of the others."""
    said = formats(metadata, tensors, path)
    floats = Counter(x.dtype for x in tensors.values() if x.is_floating_point())
    dtype = floats.most_common(1)[0][0] if floats else torch.float32
    return {name: as_packed(name, x, said[name], dtype, path) if name in said else x for name, x in tensors.items()}


class PackedDirectory(Directory):
    """A published model's directory that `save_packed` wrote: its weights have the model's own names."""

    single = PACKED

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        del self.config["quantization_config"]
        self.formats = formats(self.mapped(folder / PACKED).metadata(), self.file_of, folder / PACKED)

    def tensor(self, key: str) -> Tensor:
        found = super().tensor(key)
        if key not in self.formats:
            return found
        return as_packed(key, found, self.formats[key], self.dtype, self.path / PACKED)


def directory(folder: Path) -> Directory:
    """A published directory, its weights plain or packed."""
    own = METHOD.items() <= read_table(folder / CONFIG).items()
    return (PackedDirectory if own else Directory)(folder)
