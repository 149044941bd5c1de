"""Models from GGUF files: metadata becomes a config.json, and names follow a table of their own.

`qkv.zoo.gguf` says which key and which tensor means what.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.checkpoints.gguf import GGUF
from qkv.checkpoints.gguf_rope import with_rotary
from qkv.checkpoints.load import load_published
from qkv.errors import QkvError
from qkv.models import Model, Module
from qkv.ops.blocks.packed import Packed
from qkv.parts import Pool, Vector
from qkv.zoo.config import Config
from qkv.zoo.gguf import ALWAYS_F32, POOLING, ROPE_KEYS, Architecture, architecture_of


def load_gguf(path: Path | str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> Module:
    """The model of a .gguf file, in evaluation mode, its weights dequantised to `dtype`.

    `packed` leaves the matrices in their blocks, mapped from the file, and computes in `dtype` (`ops.blocks.packed`).
    Every key of its architecture and every tensor is accounted for: else QkvError, which says what is not.
    """
    return load_published(GGUFModel(path, dtype, packed=packed), dtype)


class GGUFModel:
    """A .gguf file as a source of a model: tensors dequantised one by one as they are asked for, or packed."""

    def __init__(self, path: Path | str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> None:
        self.file, self.dtype, self.packed = GGUF(path), dtype, packed
        self.path = self.file.path
        self.architecture, says = described(self.file)
        takes = [take for take, number in POOLING.items() if number == says.get("pooling_type")]
        self.head = Vector(Pool(takes[0])) if takes else None
        shapes = {name: entry.shape for name, entry in self.file.tensors.items()}
        factors = {
            name: shortest(self.file.tensor(name).flatten().tolist()) for name in shapes if name.startswith("rope_f")
        }
        try:
            self.config = configuration(self.architecture, says, shapes, factors, str(self.path))
        except QkvError as fault:
            raise fault if str(fault).startswith(str(self.path)) else QkvError(f"{self.path}: {fault}") from None

    def release(self) -> None:
        """Give back the memory of what stays in its blocks, once it has been copied."""
        self.file.release()

    @property
    def keys(self) -> list[str]:
        return list(self.file.tensors)

    def tables(self, spec: Model) -> list[str]:
        """Its tables of names, which are not those of the family's own files."""
        return self.architecture.tables(spec)

    def tensor(self, key: str) -> Tensor:
        entry = self.file.tensors.get(key)
        if not self.packed or entry is None or len(entry.shape) < 2 or entry.type == "F32" or key.endswith(ALWAYS_F32):
            return self.file.tensor(key, self.dtype)
        return Packed(entry.type, self.file.data(key).view(*entry.shape[:-1], -1), self.dtype)


# --- the metadata ---


def described(file: GGUF) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file, and what the keys behind its name say."""
    name, parts = file.metadata.get("general.architecture"), file.metadata.get("split.count", 1)
    if not isinstance(name, str):
        raise QkvError(f"{file.path} has no general.architecture, which says what model it is")
    if parts not in (0, 1):
        raise QkvError(f"{file.path} is one of {parts} parts of a model: join them with llama-gguf-split --merge")
    says = {key[len(name) + 1 :]: value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    return architecture_of(name, frozenset(says), str(file.path)), shortest(says)


def shortest(value: Any) -> Any:
    """Numbers of 32 bits as they were meant: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: shortest(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shortest(one) for one in value]
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def configuration(
    architecture: Architecture,
    says: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    factors: Mapping[str, list[float]],
    where: str,
) -> dict[str, Any]:
    """The config.json of a file, `factors` being its tensors of rotary factors; an unknown key raises `QkvError`."""
    keys, name = architecture.keys, architecture.name
    turns = any(row == "rope.dimension_count" for row, _ in keys.rows)
    known = {key for key, _ in keys.rows} | set(keys.fixed) | set(keys.inert) | set(ROPE_KEYS.split() if turns else ())
    left = sorted(set(says) - known)
    if left:
        raise QkvError(
            f"{where} has keys that qkv does not know of this architecture: {name}.{f', {name}.'.join(left[:6])}; "
            "ignoring them could run another model than the one that was published"
        )
    values: dict[str, Any] = {
        "model_type": architecture.kind,
        "architectures": [architecture.model],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{key: tensor in shapes for key, tensor in keys.present.items()},
        **{key: shapes[tensor][0] for key, tensor in keys.counted.items() if len(shapes.get(tensor, ())) == 2},
    }
    for key, at in keys.rows:
        if at == "sliding_window" and says.get(key) == 0:
            continue  # so Phi-4 says that it has none
        if key in says and values.setdefault(at, says[key]) != says[key]:
            raise QkvError(
                f"{where}: {name}.{key} is {says[key]!r}, where {at} is {values[at]!r} by the rest of the file"
            )
    for key, value in keys.fixed.items():
        if says.get(key, value) != value:
            raise QkvError(f"{where}: {name}.{key} is {says[key]!r}, for which qkv has no part; it runs {value!r}")
    values = {**keys.usual, **values}
    depth = says.get("block_count")
    if type(depth) is int and depth > len(shapes):
        raise QkvError(f"{where}: {name}.block_count is {depth}, and the file has {len(shapes)} tensors")
    return with_rotary(architecture, values, Config(says, (), f"{where}: {name}"), factors, where) if turns else values
