"""From one form of a model to another."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from qkv.checkpoints.directory import CONFIG
from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.gguf_export import save_gguf
from qkv.checkpoints.load import Source, load_published
from qkv.checkpoints.opening import opened
from qkv.checkpoints.pickled import Pickled
from qkv.errors import QkvError
from qkv.use.published import tokenizer_of

FILES = (".bin", ".pt", ".pth", ".safetensors", ".json", ".onnx", ".ggml")
"""Suffixes of files that are not written."""


def convert(
    source: Path, target: Path, *, kind: str = "F16", dtype: torch.dtype | None = None,
    allow_pickle: bool = False, settings: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Write a published checkpoint as a directory, or as a GGUF file with matrices of type `kind` → what it did.

    `settings` are `key=value` for keys that its config.json lacks. `allow_pickle` reads the weights of a .bin file.
    """
    if target.suffix in FILES:
        raise QkvError(f"{target} is neither a directory, which has no such suffix, nor a file that ends in .gguf")
    if target.exists() and (target.suffix == ".gguf" or not target.is_dir()):
        raise QkvError(f"{target} exists: name a new one")
    checkpoint: Source = Pickled(source) if allow_pickle and not is_safe(source) else opened(source, dtype)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals):
            raise QkvError(f"--set takes a key of config.json and its value, such as model_type=bert, not {setting!r}")
        if key in checkpoint.config:
            raise QkvError(
                f"{checkpoint.path} says {key} = {checkpoint.config[key]!r} itself; --set adds what it lacks"
            )
        checkpoint.config[key] = plain(value)
    model = load_published(checkpoint, dtype)
    if target.suffix == ".gguf":
        done = save_gguf(model, target, type=kind)
        said = [f"{target}: " + ", ".join(f"{count} tensors of type {name}" for name, count in done.types.items())]
        if done.instead:
            names = Counter(done.instead.values())
            said.append(
                "  their rows are no multiple of a block: " + ", ".join(f"{n} are {t}" for t, n in names.items())
            )
        if not done.tokenizer:
            said.append(f"  the file has no tokenizer: {done.lack or 'there is none beside the weights'}")
        return said
    tokenizer = tokenizer_of(checkpoint) if not checkpoint.path.is_dir() else None
    save_pretrained(model, target, tokenizer)
    return [f"{target}: {model.count():,} parameters, {str(next(model.parameters()).dtype).removeprefix('torch.')}"]


def is_safe(path: Path) -> bool:
    """Whether there is something other than a pickle to read."""
    return not path.is_dir() or any(path.glob("*.safetensors")) or not (path / CONFIG).is_file()


def plain(text: str) -> object:
    """A JSON value; anything that is none is taken as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
