"""qkv's own form of a model: a folder with spec.json and model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkv.checkpoints.packed import repacked, table_of
from qkv.checkpoints.whole import unwritten
from qkv.errors import QkvError
from qkv.models import Model, Module
from qkv.ops.blocks.packed import Packed
from qkv.parts.linear import Linear
from qkv.spec import dump, load

SPEC, WEIGHTS = "spec.json", "model.safetensors"


def save_model(model: Module, folder: Path) -> None:
    """Write a model's spec and weights into an existing folder."""
    refuse_adapters(model)
    (folder / SPEC).write_text(json.dumps(dump(model.spec), indent=2, ensure_ascii=False), encoding="utf-8")
    save_tensors(model.state_dict(), folder / WEIGHTS)


def load_model(folder: Path) -> Module:
    """The model that `save_model` wrote, in evaluation mode."""
    spec = load(read_json(folder / SPEC), Model, str(folder / SPEC))
    model = empty(spec)
    fill(model, load_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return model.eval()


def refuse_adapters(model: Module) -> None:
    """Refuse a model with adapters, which are no part of its own files."""
    names = sorted({name for part in model.modules() if isinstance(part, Linear) for name in part.adapters})
    if names:
        raise QkvError(f"the model has the adapter {names[0]!r}: merge it into the weights, or save_adapter writes it")


def empty(spec: Model) -> Module:
    """The model to be filled, without memory for its weights."""
    try:
        with torch.device("meta"), Unfilled():
            return spec.build()
    except RuntimeError as fault:
        raise QkvError(f"no model can have these sizes: {str(fault).splitlines()[0]}") from None


RANDOM = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_)


class Unfilled(TorchFunctionMode):
    """Leaves out the random numbers of fresh weights: drawing none on the device meta imports torch's compiler, 1 s."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in RANDOM:
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def fill(model: Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Give every parameter and saved buffer its tensor, without a second copy; `QkvError` names what does not fit."""
    wanted = model.state_dict()
    for name, want in wanted.items():
        if name not in tensors:
            raise QkvError(f"{path} lacks {name!r}: it was made by a model of another form")
        if tensors[name].shape != want.shape:
            found, expected = tuple(tensors[name].shape), tuple(want.shape)
            raise QkvError(f"{path}: {name!r} has the shape {found}, the model's is {expected}")
        if tensors[name].is_floating_point() != want.is_floating_point():
            raise QkvError(f"{path}: {name!r} holds {tensors[name].dtype}, the model's is {want.dtype}: copy it again")
    extra = sorted(set(tensors) - set(wanted))
    if extra:
        raise QkvError(f"{path} holds {extra[0]!r}, for which the model has no place ({len(extra)} such)")
    model.load_state_dict(tensors, assign=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, packed ones as the bytes of their blocks; a full disk becomes a `QkvError`."""
    bytes_of = {name: x.blocks if isinstance(x, Packed) else x.detach() for name, x in tensors.items()}
    said = {**(metadata or {}), **table_of(tensors)}
    try:
        save_file({name: tensor.contiguous() for name, tensor in bytes_of.items()}, path, said or None)
    except (SafetensorError, OSError) as fault:
        raise unwritten(path, fault if isinstance(fault, OSError) else OSError(str(fault))) from fault


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, which stays mapped; what was packed is again."""
    try:
        with safe_open(path, framework="pt") as file:
            return repacked({name: file.get_tensor(name) for name in file.offset_keys()}, file.metadata(), path)
    except FileNotFoundError:
        raise QkvError(f"{path} does not exist: the folder is incomplete, copy it again") from None
    except (SafetensorError, OSError, ValueError) as fault:
        raise QkvError(f"{path} is damaged or cut off ({fault}): copy it again") from fault


def read_json(path: Path) -> Any:
    """Parse a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QkvError(f"{path} does not exist: the folder is incomplete or not one of qkv's") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as fault:
        raise QkvError(f"{path} is not sound JSON ({fault}): copy it again") from None
