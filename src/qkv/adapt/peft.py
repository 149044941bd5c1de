"""LoRA directories of the peft package, onto a model that came from a published checkpoint and back."""

import dataclasses as dc
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qkv.adapt.lora import LoRA, attach, linears, loras
from qkv.checkpoints.load import Origin
from qkv.checkpoints.names import Link, apply, parse, shown
from qkv.checkpoints.peft import WEIGHTS, Adapter, Factors, read_peft, write_peft
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.precision import wide
from qkv.parts.linear import Linear
from qkv.zoo.config import Config
from qkv.zoo.registry import family_of

ROWS = ("ungroup", "rope")
"""Operations on a file's matrix that only move its rows, which are B's. A transpose moves nothing: peft never does."""


@dc.dataclass(frozen=True)
class Report:
    """What an adapter brought: the published module beside each Linear that it adapts."""

    name: str
    layers: dict[str, str]
    ranks: tuple[int, ...]
    parameters: int


def load_adapter(model: Module, folder: Path | str, name: str = "default") -> Report:
    """Put a peft LoRA beside the layers of a model; its weights stay as they are, and learn or not as before.

    The model is one that was loaded from a published checkpoint, whose names the adapter uses. A module that holds
    several of our matrices (q, k and v in one) shares its A among them. `QkvError` leaves the model untouched.
    """
    folder = Path(folder)
    adapter = read_peft(folder)
    links, beside = covering(model, adapter, folder / WEIGHTS), linears(model)
    made: dict[str, LoRA] = {}
    layers: dict[str, str] = {}
    for module, factors in adapter.factors.items():
        for path, layer, B in split(beside, module, links[module], factors, folder / WEIGHTS):
            dtype = wide(layer.weight)
            A, B = (x.detach().to(dtype, copy=True, memory_format=torch.contiguous_format) for x in (factors.A, B))
            made[path] = LoRA(A, B, factors.alpha, dropout=adapter.dropout, stabilised=adapter.stabilised)
            layers[path] = module
    attach(model, name, made)
    ranks = sorted({lora.rank for lora in made.values()})
    return Report(name, layers, tuple(ranks), sum(lora.A.numel() + lora.B.numel() for lora in made.values()))


def save_adapter(model: Module, folder: Path | str, name: str = "default") -> Path:
    """Write an adapter for peft to load on the transformers model of the checkpoint that this one came from.

    Where one published module holds several of our matrices, their A's are written once if they are equal; else they
    stand one below the other, and B has a block for each: the same function, of a larger rank.
    """
    folder, origin = Path(folder), origin_of(model)
    found, beside = loras(model, name), linears(model)
    links = links_of(model)[-1 if model.head is None else 0]
    factors: dict[str, Factors] = {}
    written: set[str] = set()
    for module, link in links.items():
        paths = paths_of(link)
        if not link.alias and written.isdisjoint(paths) and any(path in found for path in paths):
            factors[module] = joined(beside, link, found)
            written.update(paths)
    lost = [path for path in found if path not in written]
    if lost:
        raise QkvError(f"no module of a published {origin.source.config['model_type']} model is {shown(lost)} alone")
    one = next(iter(found.values()))
    transposed = any("transpose" in links[module].operations for module in factors)
    task = "CAUSAL_LM" if model.head is not None and Config(origin.source.config).task == "CausalLM" else None
    modules = {*links, *(key.rpartition(".")[0] for key in origin.plan.kept)}
    adapter = Adapter(factors, one.dropout, one.stabilised)
    write_peft(adapter, folder, modules, transposed, str(origin.source.path), task)
    return folder


def origin_of(model: Module) -> Origin:
    if not isinstance(model.origin, Origin):
        raise QkvError(
            "this model was not loaded from a published checkpoint, so that its layers have no names for peft: "
            "write it by save_pretrained and load that folder"
        )
    return model.origin


def links_of(model: Module) -> list[dict[str, Link]]:
    """Published module → which of our weights it holds; for each form that the family's names have."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    forms = []
    for table in family_of(origin_of(model).source.config).tables(model.spec):
        links: dict[str, Link] = {}
        for link in parse(table).links(shapes):
            for source in link.sources:
                if source.endswith(".weight"):
                    links.setdefault(source.removesuffix(".weight"), link)
        forms.append(links)
    return forms


def covering(model: Module, adapter: Adapter, where: Path) -> dict[str, Link]:
    """The links of the first form that has every module of the adapter."""
    forms = links_of(model)
    missing = [[module for module in adapter.factors if module not in links] for links in forms]
    for links, lacking in zip(forms, missing, strict=True):
        if not lacking:
            return links
    kind = origin_of(model).source.config["model_type"]
    raise QkvError(f"{where} adapts {shown(min(missing, key=len))}, which this {kind} model does not have")


def paths_of(link: Link) -> list[str]:
    return [target.removesuffix(".weight") for target in link.targets]


def rows(link: Link) -> list[str]:
    """The operations that concern B."""
    return [operation for operation in link.operations if operation != "transpose"]


def split(
    beside: Mapping[str, Linear], module: str, link: Link, factors: Factors, where: Path
) -> list[tuple[str, Linear, Tensor]]:
    """The Linears that a module holds, each with its path and its rows of B."""
    paths = paths_of(link)
    if link.stacked or any(path not in beside for path in paths) or any(not op.startswith(ROWS) for op in rows(link)):
        raise QkvError(f"{where} adapts {module}, here {paths[0]}, which is no Linear: only those take a LoRA")
    layers = [beside[path] for path in paths]
    outputs, inputs = [layer.weight.shape[0] for layer in layers], layers[0].weight.shape[1]
    if factors.A.shape[1] != inputs or len(factors.B) != sum(outputs):
        found, wanted = (factors.A.shape[1], len(factors.B)), (inputs, sum(outputs))
        raise QkvError(
            f"{where}: A and B of {module} lead from {found[0]} features to {found[1]}, "
            f"and the model's own from {wanted[0]} to {wanted[1]}"
        )
    return list(zip(paths, layers, apply(rows(link), factors.B).split(outputs), strict=True))


def joined(beside: Mapping[str, Linear], link: Link, found: Mapping[str, LoRA]) -> Factors:
    """A and B of a whole module, of whose matrices some may have no LoRA."""
    paths = paths_of(link)
    some = [found[path] for path in paths if path in found]
    one, blocks = some[0], list[Tensor]()
    same = all(lora.alpha == one.alpha and torch.equal(lora.A, one.A) for lora in some)
    for path in paths:
        if path in found:
            blocks.append(found[path].B if same else found[path].B * found[path].scale)
        else:
            blocks.append(one.B.new_zeros(len(beside[path].weight), one.rank if same else 0))
    A = one.A if same else torch.cat([lora.A for lora in some])
    B = torch.cat(blocks) if same else torch.block_diag(*blocks)
    alpha = one.alpha if same else len(A) ** (0.5 if one.stabilised else 1.0)  # the scale is in B, what is left is 1
    return Factors(A.detach(), apply(rows(link), B.detach(), back=True), alpha)
