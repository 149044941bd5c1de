"""Back out: a directory that the transformers package loads."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qkv.checkpoints.directory import BESIDE
from qkv.checkpoints.load import Origin
from qkv.checkpoints.names import parse, write
from qkv.checkpoints.weights import refuse_adapters, save_tensors
from qkv.checkpoints.whole import refuse_filled, whole_folder
from qkv.errors import QkvError
from qkv.models import Model, Module, Sequence
from qkv.parts.head import Vector
from qkv.spec import diff, edit, walk
from qkv.zoo import registry
from qkv.zoo.config import Config
from qkv.zoo.registry import family_of
from qkv.zoo.solve import configuration

NEAREST = 4
"""So many published presets are tried as the beginning of a configuration, the nearest first."""


class Saves(Protocol):
    def save(self, path: Path) -> None: ...


def save_pretrained(model: Module, folder: Path | str, tokenizer: Saves | None = None) -> Path:
    """Write config.json, model.safetensors and the tokenizer's files, for the transformers package to load.

    The model may have been loaded from a checkpoint and edited since, or built from a spec that a published family
    describes. `QkvError` says what no family has a form for; `save_model` keeps such a model in qkv's own form.
    """
    folder = Path(folder)
    refuse_filled(folder)
    values, tensors = published(model)
    values["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    values.pop("torch_dtype", None)
    with whole_folder(folder) as part:
        (part / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
        save_tensors(tensors, part / "model.safetensors", {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(part)
        elif isinstance(model.origin, Origin) and model.origin.source.path.is_dir():
            for name in BESIDE:
                if (model.origin.source.path / name).is_file():
                    (part / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(model.origin.source.path / name, part / name)
    return folder


def published(model: Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors by their published names."""
    refuse_adapters(model)
    spec, state, origin = unpooled(model.spec), model.state_dict(), model.origin
    if isinstance(origin, Origin):
        values = configuration(spec, origin.source.config)
        return values, {**dict(write(parse(table_of(model, values)), state)), **origin.kept(model.spec)}
    found: dict[str, dict[str, Any]] = {}
    for base in sorted(bases(spec), key=lambda base: apart(registry.spec_from(base), spec)):
        found.setdefault(base["architectures"][0], base)
    fault = "none has its kind of wiring"
    for base in list(found.values())[:NEAREST]:
        try:
            values = configuration(spec, base)
        except QkvError as said:
            fault = str(said) if fault.startswith("none") else fault
            continue
        return values, dict(write(parse(table_of(model, values)), state))
    raise QkvError(f"no published family describes this model, so other tools cannot load it: {fault}")


def unpooled(spec: Model) -> Model:
    """The spec without a pooling head that has no weights, which is not config.json's business."""
    head = spec.head if isinstance(spec, Sequence) else None
    return edit(spec, "head", None) if isinstance(head, Vector) and head.pool.transform is None else spec


def bases(spec: Model) -> list[dict[str, Any]]:
    """The configurations of the published presets that are wired like a spec."""
    made = [make() for make in registry.PRESETS.values()]
    found = [values for values in made if isinstance(values, dict)]
    return [values for values in found if type(registry.spec_from(values)) is type(spec)]


def apart(one: Model, other: Model) -> tuple[int, int]:
    """How far two specs are from each other: by the parts that only one of them has, then by their numbers."""
    kinds = [{(re.sub(r"\d+", "*", path), type(value)) for path, value in walk(spec)} for spec in (one, other)]
    return len(kinds[0] ^ kinds[1]), len(diff(one, other))


def table_of(model: Module, values: dict[str, Any]) -> str:
    """The names to write: those that the model's file followed, where they still fit it."""
    tables = family_of(values).tables(model.spec)
    origin = model.origin
    bare = not Config(values).task and getattr(model.spec, "head", None) is None
    return origin.table if isinstance(origin, Origin) and origin.table in tables else tables[-1 if bare else 0]
