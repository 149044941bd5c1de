"""A directory as the transformers package writes it: config.json, and safetensors in one file or several."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkv.checkpoints.weights import read_json
from qkv.errors import QkvError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Directory:
    """Tensors by the names of the file, mapped into memory: a tensor is read from disk when it is used."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        self.files = [self.opened(path) for path in self.shards()]
        self.file_of = {key: file for file in self.files for key in list(file.keys())}

    def shards(self) -> list[Path]:
        """The files of weights."""
        if (self.path / SINGLE).is_file():
            return [self.path / SINGLE]
        if not (self.path / INDEX).is_file():
            pickles = sorted([*self.path.glob("*.bin"), *self.path.glob("*.pt"), *self.path.glob("*.pth")])
            if pickles:
                raise QkvError(
                    f"{pickles[0]} is a pickle, which can run code when it is opened; if you trust it, "
                    f"`qkv convert {self.path} NEW --allow-pickle` reads its weights alone and writes safetensors"
                )
            raise QkvError(f"{self.path} has no {SINGLE} beside its {CONFIG}: the folder is incomplete, copy it again")
        index = read_json(self.path / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise QkvError(f"{self.path / INDEX} has no table weight_map from tensors to files")
        found = sorted(set(names.values()))
        if any(Path(name).name != name for name in found):
            raise QkvError(f"{self.path / INDEX} names files outside of its folder")
        return [self.path / name for name in found]

    def opened(self, path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError:
            raise QkvError(f"{path} does not exist: the folder is incomplete, copy it again") from None
        except (SafetensorError, OSError, ValueError) as fault:
            raise QkvError(f"{path} is damaged or cut off ({fault}): copy it again") from None

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
