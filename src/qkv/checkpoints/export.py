"""Back out: a directory that the transformers package loads."""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qkv.checkpoints.load import Origin
from qkv.checkpoints.names import parse, write
from qkv.checkpoints.weights import save_tensors
from qkv.checkpoints.whole import whole_folder
from qkv.errors import QkvError
from qkv.models import Module
from qkv.spec import diff
from qkv.zoo import registry
from qkv.zoo.registry import family_of
from qkv.zoo.solve import configuration

BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
"""The files of a checkpoint that say how text becomes ids and back."""


class Saves(Protocol):
    def save(self, path: Path) -> None: ...


def save_pretrained(model: Module, folder: Path | str, tokenizer: Saves | None = None) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files, for the transformers package to load.

    The model may have been loaded from a checkpoint and edited since, or built from a spec that a published family
    describes. `QkvError` says what no family has a form for; `save_model` keeps such a model in qkv's own form.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QkvError(f"{folder} exists and is not an empty folder; name a new one")
    values, tensors = published(model)
    values["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values.pop("torch_dtype", None)
    with whole_folder(folder) as part:
        (part / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        save_tensors(tensors, part / "model.safetensors", {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(part / "tokenizer.json")
        elif isinstance(model.origin, Origin) and model.origin.source.path.is_dir():
            for name in BESIDE:
                if (model.origin.source.path / name).is_file():
                    shutil.copyfile(model.origin.source.path / name, part / name)
    return folder


def published(model: Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors by their published names."""
    state, origin = model.state_dict(), model.origin
    if isinstance(origin, Origin):
        values = configuration(model.spec, origin.source.config)
        return values, {**dict(write(parse(table_of(model, values)), state)), **origin.kept(model.spec)}
    faults: dict[int, str] = {}
    for base in bases():
        try:
            values = configuration(model.spec, base)
        except QkvError as fault:
            faults[len(diff(registry.spec_from(base), model.spec))] = str(fault)
            continue
        return values, dict(write(parse(table_of(model, values)), state))
    raise QkvError(f"no published family describes this model, so other tools cannot load it: {faults[min(faults)]}")


def bases() -> list[dict[str, Any]]:
    """The configurations of the published presets."""
    made = [make() for make in registry.PRESETS.values()]
    return [values for values in made if isinstance(values, dict)]


def table_of(model: Module, values: dict[str, Any]) -> str:
    """The names to write: those that the model's file followed, where they still fit it."""
    tables = family_of(values).tables(model.spec)
    origin = model.origin
    bare = values["architectures"][0].endswith("Model") and not values["architectures"][0].endswith("LMHeadModel")
    return origin.table if isinstance(origin, Origin) and origin.table in tables else tables[-1 if bare else 0]
