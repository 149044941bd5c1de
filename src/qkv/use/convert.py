"""From one form of a model to another."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
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


def convert(
    source: Path, target: Path, *, kind: str = "F16", dtype: torch.dtype | None = None,
    allow_pickle: bool = False, settings: Sequence[str] = (),
) -> Iterator[str]:  # fmt: skip
    """Write a published checkpoint as a directory, or as a GGUF file with matrices of type `kind`; says what it did.

    `settings` are `key=value` for keys that its config.json lacks. `allow_pickle` reads the weights of a .bin file.
    """
    if source.suffix == ".gguf" and target.suffix == ".gguf" and source.resolve() == target.resolve():
        raise QkvError(f"{target} is the file to be converted: name a new one")
    checkpoint: Source = Pickled(source) if allow_pickle and not is_safe(source) else opened(source, dtype)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in checkpoint.config:
            raise QkvError(
                f"{checkpoint.path} says {key} = {checkpoint.config[key]!r} itself; --set adds what it lacks"
            )
        checkpoint.config[key] = plain(value)
    model = load_published(checkpoint, dtype)
    if target.suffix == ".gguf":
        done = save_gguf(model, target, type=kind)
        yield f"{target}: " + ", ".join(f"{count} tensors of type {name}" for name, count in done.types.items())
        if done.instead:
            names = Counter(done.instead.values())
            yield "  their rows are no multiple of a block: " + ", ".join(f"{n} are {one}" for one, n in names.items())
        if not done.tokenizer:
            yield "  the file has no tokenizer: none is known for this checkpoint that GGUF has a form for"
        return
    tokenizer = tokenizer_of(checkpoint) if not checkpoint.path.is_dir() else None
    save_pretrained(model, target, tokenizer)
    yield f"{target}: {model.count():,} parameters, {str(next(model.parameters()).dtype).removeprefix('torch.')}"


def is_safe(path: Path) -> bool:
    """Whether there is something other than a pickle to read."""
    return not path.is_dir() or any(path.glob("*.safetensors")) or not (path / CONFIG).is_file()


def plain(text: str) -> object:
    """A JSON value; anything that is none is taken as text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
