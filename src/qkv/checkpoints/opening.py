"""Which format a path holds."""

from pathlib import Path

import torch

from qkv.checkpoints.directory import CONFIG
from qkv.checkpoints.gguf import is_gguf
from qkv.checkpoints.gguf_model import GGUFModel
from qkv.checkpoints.llama2c_model import Llama2CModel
from qkv.checkpoints.load import Source
from qkv.checkpoints.packed import PackedDirectory, directory
from qkv.errors import QkvError
from qkv.spec import nearest


def opened(path: Path, dtype: torch.dtype | None = None, *, packed: bool = False) -> Source:
    """The checkpoint at a path: a directory with a config.json, a .gguf file, or a .bin file of llama2.c.

    `dtype` is what a .gguf file's weights become, fp32 by default, or with `packed`, which leaves its matrices in their
    blocks, what is computed in. Elsewhere `packed` only refuses what is not.
    """
    found = held(path, dtype, packed)
    if packed and not isinstance(found, GGUFModel | PackedDirectory):
        raise not_packed(path)
    return found


def not_packed(path: Path) -> QkvError:
    """What is said of plain weights where packed ones were asked for."""
    return QkvError(f"{path} keeps no weights packed: `qkv convert {path} NEW --quantize int8` writes such a directory")


def held(path: Path, dtype: torch.dtype | None, packed: bool) -> Source:
    if path.is_dir():
        if (path / CONFIG).is_file():
            return directory(path)
        below = sorted(found.parent.name for found in path.glob(f"*/{CONFIG}"))
        inside = f"; there are models in its folders {', '.join(below)}" if below else ""
        raise QkvError(f"{path} holds no model: neither {CONFIG} nor run.json nor spec.json is there{inside}")
    if not path.exists():
        around = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise QkvError(f"{path} does not exist{nearest(path.name, around)}")
    if is_gguf(path):
        return GGUFModel(path, dtype or torch.float32, packed=packed)
    if path.suffix == ".bin":
        return Llama2CModel(path)
    raise QkvError(f"{path} is no model: a directory, a .gguf file or a .bin file of llama2.c is expected")
