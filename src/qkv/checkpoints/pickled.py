"""Weights in a pickle, for those who trust one enough to convert it."""

import re
import zipfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.checkpoints.directory import CONFIG, read_table
from qkv.checkpoints.names import shown
from qkv.errors import QkvError


class Pickled:
    """A directory whose weights are in .bin or .pt files. torch's weights-only loader reads tensors and nothing else:
    a pickle that asks for anything more is refused, not run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config: dict[str, Any] = read_table(folder / CONFIG)
        files = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        others = ("training_args.bin", "optimizer.pt", "scheduler.pt")
        files = [file for file in files if file.is_file() and file.name not in others]
        if not files:
            raise QkvError(f"{folder} holds no pickle of weights: no .bin, .pt or .pth file")
        self.tensors: dict[str, Tensor] = {}
        for file in files:
            found = weights(file)
            twice = [name for name in found if name in self.tensors]
            if twice:
                raise QkvError(f"{file} holds {shown(twice)}, as another file does: leave one of them in {folder}")
            self.tensors.update(found)

    @property
    def keys(self) -> list[str]:
        return list(self.tensors)

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    @cached_property
    def dtype(self) -> torch.dtype:
        """That of most of its tensors."""
        counts = Counter(x.dtype for x in self.tensors.values() if x.is_floating_point())
        if not counts:
            raise QkvError(f"{self.path} holds no tensor of floating-point numbers")
        return counts.most_common(1)[0][0]


def weights(file: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        if swells(file):
            raise QkvError(f"{file} is compressed, which no file of weights is")
        found = torch.load(file, map_location="cpu", weights_only=True)
    except QkvError:
        raise
    except Exception as fault:  # whatever the damage has led the loader to
        asked = re.search(r"GLOBAL ([\w.]{1,80})", str(fault))
        if asked:
            raise QkvError(f"{file} holds more than weights: it asks for {asked[1]}, which is not run") from None
        raise QkvError(f"{file} is no file of weights, or is damaged: copy it again, or ask for safetensors") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(name, str) and plain(x) for name, x in found.items()):
        raise QkvError(f"{file} holds no table of names and plain tensors")
    return found


def swells(file: Path) -> bool:
    """Whether unpacking would make it larger than it is."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return sum(entry.file_size for entry in archive.infolist()) > file.stat().st_size


def plain(x: object) -> bool:
    """Whether it is a tensor of numbers in memory: not sparse, not quantised, not without data."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_quantized or x.device.type != "cpu":
        return False
    return x.numel() * x.element_size() <= x.untyped_storage().nbytes()  # not one number spread over a matrix
