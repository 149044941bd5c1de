"""From a published checkpoint to a model: find the family, read the configuration, follow the names."""

import dataclasses as dc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from qkv.checkpoints.directory import CONFIG
from qkv.checkpoints.names import Plan, itself, parse, plan, read
from qkv.checkpoints.packed import PackedDirectory, directory
from qkv.checkpoints.sentence import vector_head
from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.models import Model, Module, Sequence
from qkv.parts import Vector
from qkv.spec import edit
from qkv.zoo.registry import family_of, spec_from


class Source(Protocol):
    """A checkpoint of any format."""

    path: Path
    config: dict[str, Any]
    """In the keys of config.json."""

    @property
    def keys(self) -> list[str]: ...

    @property
    def dtype(self) -> torch.dtype:
        """That of most of its tensors."""

    def tensor(self, key: str) -> Tensor: ...


@runtime_checkable
class Foreign(Protocol):
    """A checkpoint whose tensors are not named as in the family's own files."""

    head: Vector | None
    """How one vector is made of a text, where the file says that."""

    def tables(self, spec: Model) -> list[str]:
        """The tables that it may follow."""


@dc.dataclass(frozen=True)
class Origin:
    """Where a model came from, for its way back."""

    source: Source
    spec: Model
    """As it was in the checkpoint."""
    table: str
    """The names that its file followed."""
    plan: Plan

    def kept(self, spec: Model) -> dict[str, Tensor]:
        """The tensors that the model has no part for; none once it has another width, which they would not fit."""
        if getattr(spec, "width", None) != getattr(self.spec, "width", None):
            return {}
        return {key: self.source.tensor(key) for key in self.plan.kept}


def load_published(source: Source, dtype: torch.dtype | None = None) -> Module:
    """The model of a checkpoint, in evaluation mode, its weights in `dtype` or in the file's own.

    Tensors that are used as they stand stay mapped from the file. Every key of the configuration and every tensor is
    accounted for, and every parameter filled: else `QkvError`.
    """
    spec = described(source)
    try:
        model = empty(spec)
    except QkvError as fault:
        raise QkvError(f"{told_by(source)}: {fault}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    table, made = matched(source, spec, shapes)
    wanted = dtype or source.dtype
    try:
        tensors = read(made, shapes, lambda key: numbers(source, key).to(wanted))
    except QkvError as fault:
        raise QkvError(f"{source.path}: {fault}") from None
    model.load_state_dict(tensors, assign=True)
    model.origin = Origin(source, spec, table, made)
    return model.eval()


def described(source: Source) -> Model:
    """The spec of a checkpoint's model; no weight is read."""
    theirs = () if isinstance(source, Foreign | PackedDirectory) else source.keys
    spec = spec_from(source.config, theirs, str(told_by(source)))
    pooled = source.head if isinstance(source, Foreign) else vector_head(source.path)
    if pooled is not None and isinstance(spec, Sequence) and spec.head is None:
        spec = edit(spec, "head", pooled)
    return spec


def told_by(source: Source) -> Path:
    """The file that a fault of the configuration lies in."""
    return source.path if isinstance(source, Foreign) else source.path / CONFIG


def numbers(source: Source, key: str) -> Tensor:
    """A tensor of weights, which are floating-point numbers."""
    tensor = source.tensor(key)
    if not tensor.is_floating_point():
        raise QkvError(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}, where floating-point numbers are due")
    return tensor


def matched(source: Source, spec: Model, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, Plan]:
    """The first of the family's tables that covers the file; "" for a file that has the model's own names."""
    if isinstance(source, PackedDirectory):
        try:
            return "", plan(itself(shapes), shapes, source.keys)
        except QkvError as fault:
            raise QkvError(f"{source.path}: {fault}") from None
    faults = []
    for table in (source if isinstance(source, Foreign) else family_of(source.config)).tables(spec):
        try:
            return table, plan(parse(table), shapes, source.keys)
        except QkvError as fault:
            faults.append(str(fault))
    shortest = min(faults, key=len)
    raise QkvError(f"{source.path} is no {source.config['model_type']} model of this configuration: {shortest}")


def load_directory(folder: Path, dtype: torch.dtype | None = None) -> Module:
    """The model of a directory as the transformers package writes it, or `save_packed`."""
    return load_published(directory(folder), dtype)
