"""Back out: a directory that the transformers package loads."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qkv.checkpoints.directory import BESIDE, CONFIG, SINGLE
from qkv.checkpoints.load import Origin
from qkv.checkpoints.names import parse, write
from qkv.checkpoints.packed import METHOD, PACKED
from qkv.checkpoints.weights import refuse_adapters, save_model, save_tensors
from qkv.checkpoints.whole import refuse_filled, whole_folder
from qkv.errors import QkvError
from qkv.models import Model, Module, Sequence
from qkv.ops.blocks.packed import Packed
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
    describes; packed weights are written as the plain ones that they stand for. `QkvError` says what no family has a
    form for; `save_model` keeps such a model in qkv's own form.
    """
    folder = Path(folder)
    refuse_filled(folder)
    values, tensors = published(model)
    with whole_folder(folder) as part:
        write_config(part, values, next(iter(tensors.values())).dtype)
        save_tensors(tensors, part / SINGLE, {"format": "pt"})
        write_beside(part, model, tokenizer)
    return folder


def save_packed(model: Module, folder: Path | str, tokenizer: Saves | None = None) -> Path:
    """Write a model with its weights as they are kept, packed ones in their blocks, which `load` maps into memory.

    One that was loaded from a published checkpoint has a config.json and what stood beside it, any other a spec.json.
    Only qkv reads the folder, and weights for which the model has no part are not in it: `save_pretrained` writes one
    for others.
    """
    folder = Path(folder)
    refuse_filled(folder)
    refuse_adapters(model)
    with whole_folder(folder) as part:
        if isinstance(model.origin, Origin):
            values = configuration(unpooled(model.spec), model.origin.source.config)
            write_config(part, {**values, **METHOD}, next(model.parameters()).dtype)
            save_tensors(model.state_dict(), part / PACKED)
        else:
            save_model(model, part)
        write_beside(part, model, tokenizer)
    return folder


def write_config(folder: Path, values: Mapping[str, Any], dtype: torch.dtype) -> None:
    said = {**values, "dtype": str(dtype).removeprefix("torch.")}
    said.pop("torch_dtype", None)
    (folder / CONFIG).write_text(json.dumps(said, indent=2, ensure_ascii=False), encoding="utf-8")


def write_beside(folder: Path, model: Module, tokenizer: Saves | None) -> None:
    """The files of a tokenizer, or those that stood beside the weights."""
    if tokenizer is not None:
        tokenizer.save(folder)
    elif isinstance(model.origin, Origin) and model.origin.source.path.is_dir():
        for name in BESIDE:
            if (model.origin.source.path / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(model.origin.source.path / name, folder / name)


def published(model: Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors by their published names."""
    refuse_adapters(model)
    spec, origin = unpooled(model.spec), model.origin
    state = {name: x.dequantise() if isinstance(x, Packed) else x for name, x in model.state_dict().items()}
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
