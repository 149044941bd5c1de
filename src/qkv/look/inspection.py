"""What a model is made of: a tree of its parts with shapes, parameters, floating-point operations and cache bytes.

Nothing is computed: the model is built and run on torch's meta device, and torch's own counter adds up the operations
of every product. So a part needs no formula of its own, and a third party's part is counted like any other.
"""

import dataclasses as dc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Model, Module, SequenceModel
from qkv.spec import Spec


@dc.dataclass
class Node:
    """One part of a model; equal neighbours are one node that stands `times` times."""

    name: str
    what: str
    parameters: int
    shape: tuple[int, ...] | None
    """Of its output, for one sequence."""
    flops: int
    """Of one forward pass of one sequence: 2 for each multiply-add, all of a causal attention's scores counted."""
    cache_bytes: int
    """What it remembers of one sequence, in fp32."""
    children: list["Node"] = dc.field(default_factory=list)
    times: int = 1


@dc.dataclass
class Inspection:
    """A model seen from outside, for sequences of `length` tokens."""

    root: Node
    length: int

    def __str__(self) -> str:
        return "\n".join(lines(self))


def inspect(spec: Model, length: int | None = None) -> Inspection:
    """Inspect the model that a spec describes, on one source and one target of `length` tokens.

    Left out, the length is 128, or the most that the model has positions for.
    """
    if length is not None and length < 1:
        raise QkvError(f"a sequence to inspect has at least 1 token, not {length}")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the counter warns that meta tensors are not on an accelerator
        model = spec.build().eval()
        length = min(128, model.positions or 128) if length is None else length
        shapes, flops = measured(model, length)
        caches = cached(model, length)
    return Inspection(node("", type(spec).__name__, model, shapes, flops, caches), length)


def measured(model: Module, length: int) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Module path → shape of its output and operations, of one forward pass."""
    shapes: dict[str, tuple[int, ...]] = {}
    flops: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    before: dict[str, int] = {}

    def enter(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            before[path] = counter.get_total_flops()

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            flops[path] = flops.get(path, 0) + counter.get_total_flops() - before[path]
            if isinstance(output, Tensor):
                shapes[path] = tuple(output.shape[1:])

        return hook

    for path, module in model.named_modules():
        module.register_forward_pre_hook(enter(path))
        module.register_forward_hook(leave(path))
    ids = torch.zeros(1, length, dtype=torch.long)
    with counter, torch.no_grad():
        if isinstance(model, EncoderDecoderModel):
            model(ids, **model.encode(ids))
        elif isinstance(model, SequenceModel):
            model(ids) if model.head is not None else model.hidden(ids)
    flops[""] = counter.get_total_flops()
    return shapes, flops


def cached(model: Module, length: int) -> dict[str, int]:
    """Path of a branch's body → bytes that it remembers of a sequence."""
    if isinstance(model, EncoderDecoderModel):
        ids = torch.zeros(1, length, dtype=torch.long)
        path, state = "decoder", model.new_state(1, length, **model.encode(ids))
    elif isinstance(model, SequenceModel) and model.spec.mask.incremental:
        path, state = "stack", model.new_state(1, length)
    else:
        return {}
    return {
        f"{path}.{n}.{branch}.f": sum(tensor.numel() * tensor.element_size() for tensor in cell.tensors().values())
        for n, layer in enumerate(state.cells)
        for branch, cell in layer.items()
    }


def node(
    path: str, name: str, module: nn.Module,
    shapes: dict[str, tuple[int, ...]], flops: dict[str, int], caches: dict[str, int],
) -> Node:  # fmt: skip
    children = [
        node(f"{path}.{child}" if path else child, child, below, shapes, flops, caches)
        for child, below in module.named_children()
        if any(True for _ in below.parameters()) or flops.get(f"{path}.{child}" if path else child)
    ]
    cache = caches.get(path, 0) + sum(child.cache_bytes * child.times for child in children)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Node(name, described(module), parameters, shapes.get(path), flops.get(path, 0), cache, merged(children))


def described(module: nn.Module) -> str:
    """The part's own fields, without the parts in it."""
    spec = getattr(module, "spec", None)
    if not isinstance(spec, Spec):
        return f"{type(module).__name__.lstrip('_')} {module.extra_repr()}".strip()
    own = {key: value for key, value in spec.children().items() if not holds_parts(value)}
    default = {field.name: field.default for field in dc.fields(spec)}
    told = [f"{key}={value!r}" for key, value in own.items() if value != default.get(key)]
    return f"{type(spec).__name__}({', '.join(told)})".removesuffix("()")


def holds_parts(value: Any) -> bool:
    return isinstance(value, Spec | dict) or (isinstance(value, tuple) and any(map(holds_parts, value)))


def merged(nodes: list[Node]) -> list[Node]:
    """Neighbours that differ in nothing but their name become one."""
    found: list[Node] = []
    for one in nodes:
        last = found[-1] if found else None
        if last is not None and dc.replace(last, name=one.name, times=1) == one and one.name.isdigit():
            found[-1] = dc.replace(last, times=last.times + 1)
        else:
            found.append(one)
    return found


def lines(inspection: Inspection) -> Iterator[str]:
    """The tree as text."""
    rows = list(walk(inspection.root))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    heads = ("part", "output", "parameters", "FLOPs", "cache")
    widths = [max(width, len(head)) for width, head in zip(widths, heads, strict=True)]
    for row in (heads, *rows):
        name, shape, *numbers = row
        cells = [f"{number:>{width}}" for number, width in zip(numbers, widths[2:], strict=True)]
        yield f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {'  '.join(cells)}".rstrip()
    root = inspection.root
    yield ""
    yield (
        f"{root.parameters:,} parameters; for one sequence of {inspection.length} tokens "
        f"{root.flops:,} FLOPs forward and {root.cache_bytes:,} bytes of cache (fp32)"
    )


def walk(at: Node, lead: str = "", below: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    name = at.name if at.times == 1 else f"{at.name} … {int(at.name) + at.times - 1}"
    shape = " × ".join(map(str, at.shape)) if at.shape else ""
    numbers = [f"{at.times} × {n:,}" if at.times > 1 else f"{n:,}" for n in (at.parameters, at.flops, at.cache_bytes)]
    what = "" if at.what.startswith(name) else f"  {at.what}"
    yield f"{lead}{name}{what}", shape, numbers[0], numbers[1], numbers[2] if at.cache_bytes else ""
    for n, child in enumerate(at.children):
        end = n == len(at.children) - 1
        yield from walk(child, below + ("└─ " if end else "├─ "), below + ("   " if end else "│  "))
