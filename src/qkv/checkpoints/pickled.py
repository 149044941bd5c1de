"""Weights in a pickle, for those who trust one enough to convert it."""

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
        files = [file for file in files if file.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
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
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as fault:  # whatever the damage has led the loader to
        said = str(fault).partition("WeightsUnpickler error: ")[2] or str(fault) or type(fault).__name__
        raise QkvError(f"{file} holds more than weights, or is damaged ({shown(said.splitlines()[:1])})") from None
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(name, str) and plain(x) for name, x in found.items()):
        raise QkvError(f"{file} holds no table of names and plain tensors")
    return found


def plain(x: object) -> bool:
    """Whether it is a tensor of numbers in memory: not sparse, not quantised, not without data."""
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_quantized and x.device.type == "cpu"
