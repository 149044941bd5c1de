"""Weights of fewer bits, in the place of a model's own, and back."""

import dataclasses as dc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qkv.adapt.lora import written_out
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.blocks import BLOCKS, by_row, fit
from qkv.ops.blocks.packed import Packed
from qkv.parts.embed import TokenEmbedding
from qkv.parts.head import VocabularyHead
from qkv.parts.linear import Linear
from qkv.spec import matches, nearest

FORMATS = {"int8": "Q8_0", "int8-channel": "Q8_0", "int4": "Q4_1", "bf16": "BF16"}
"""What weights become: 8 bits and a scale for each 32 of a row, or the same for all of it, 4 bits with a scale and a
minimum for each 32, bfloats."""

VOCABULARY = {**FORMATS, "int4": "Q8_0"}
"""What the matrices with a row for each token become. At 4 bits they would do a third of all harm: on 300 tokens of
English, the perplexity of Gemma 3 270M is 19.6, 23.0 with layers of 4 bits, and 25.2 with such a table too."""

DECIDING = ("expert", "label")
"""Rows that choose among few, as a router's and a classifier's: tiny, and a small error turns a choice over."""

LARGEST = torch.finfo(torch.float16).max


@dc.dataclass(frozen=True)
class Quantised:
    """What `quantise` did. Names are those of the state dict."""

    formats: dict[str, str]
    """Each weight that it packed, and how."""
    unfit: dict[str, int]
    """Weights that stay as they were because their rows are no multiple of a block; how long those are."""
    before: int
    """The bytes of all parameters."""
    after: int


@dc.dataclass(frozen=True)
class Place:
    """Where a weight stands."""

    holder: nn.Module
    attribute: str
    rows: str = ""
    """What a row of it is for, as `Linear.axes` says it."""

    @property
    def weight(self) -> Tensor:
        found: Tensor = getattr(self.holder, self.attribute)
        return found


def quantise(model: Module, kind: str, *, keep: str | Sequence[str] = ()) -> Quantised:
    """Pack a model's matrices to one of `FORMATS`, "int4" say, in place, each gone before the next; → what was done.

    Those are the weights of every Linear, of experts, of the head over a vocabulary and of the tokens' table, which
    under int4 stays at 8 bits as the head does. Norms, biases, positions, routers and classifiers stay as they are,
    and so does what matches one of the globs `keep`, what has as few bits already, and rows that are no multiple of
    32. The state dict keeps its names and shapes; adapters go on working, and can be trained. `QkvError` leaves the
    model as it was.
    """
    check_kind(kind)
    before, found = size(model), dict(places(model))
    formats: dict[str, str] = {}
    unfit: dict[str, int] = {}
    for name in chosen(found, keep):
        first = found[name][0]
        format = (VOCABULARY if first.rows == "vocab" else FORMATS)[kind]
        block, weight = BLOCKS[format], first.weight
        if bits(weight) <= 8 * block.bytes / block.weights:
            continue
        if weight.shape[-1] % block.weights:
            unfit[name] = weight.shape[-1]
        else:
            check(name, weight)
            formats[name] = format
    for name, format in formats.items():
        pack(found[name], format, by_row if kind == "int8-channel" else partial(fit, format))
    return Quantised(formats, unfit, before, size(model))


def check_kind(kind: str) -> None:
    """Refuse what weights cannot become."""
    if kind not in FORMATS:
        raise QkvError(f"weights are quantised to {', '.join(FORMATS)}, not to {kind!r}{nearest(kind, FORMATS)}")


def pack(where: Sequence[Place], format: str, rounding: Callable[[Tensor], Tensor]) -> None:
    """Replace a weight in all its places; it is freed before the next is packed."""
    old = where[0].weight
    blocks = rounding(old.dequantise() if isinstance(old, Packed) else old).to(old.device)
    put(where, nn.Parameter(Packed(format, blocks, old.dtype), old.requires_grad))


def dequantise(model: Module, which: Callable[[Packed], bool] = lambda weight: True) -> None:
    """Give a model plain weights again, those that its blocks stand for, in place: all, or `which` says so of."""
    found: dict[int, list[Place]] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, Packed) and which(weight):
                found.setdefault(id(weight), []).append(Place(module, name))
    for where in found.values():
        old = where[0].weight
        assert isinstance(old, Packed)
        put(where, nn.Parameter(old.dequantise(), old.requires_grad))


def put(where: Sequence[Place], weight: nn.Parameter) -> None:
    for place in where:
        setattr(place.holder, place.attribute, weight)


# --- which weights ---


def places(model: Module) -> Iterator[tuple[str, list[Place]]]:
    """The weights that can be packed, by name, each with all the places where it stands."""
    found: dict[int, tuple[str, list[Place]]] = {}
    for path, module in model.named_modules():
        for name, place in matrices(module):
            full = f"{path}.{name}" if path else name
            found.setdefault(id(place.weight), (full, []))[1].append(place)
    return iter(found.values())


def matrices(module: nn.Module) -> Iterator[tuple[str, Place]]:
    """The matrices of a known use that a module holds."""
    axes = getattr(module, "axes", None)
    if isinstance(module, Linear) and module.axes[0] not in DECIDING:
        yield "weight", Place(module, "weight", module.axes[0])
    elif isinstance(module, VocabularyHead) and module.weight is not None:
        yield "weight", Place(module, "weight", "vocab")
    elif isinstance(module, TokenEmbedding) and module.tokens is not None:
        yield "tokens.weight", Place(module.tokens, "weight", "vocab")
    elif isinstance(axes, dict):  # experts, stacked
        yield from ((name, Place(module, name, meaning[-2])) for name, meaning in axes.items())


def chosen(names: Iterable[str], keep: str | Sequence[str]) -> list[str]:
    """The names that no glob keeps; a glob may leave out the last `.weight`."""
    plain = {name: name.removesuffix(".weight") for name in names}
    kept: set[str] = set()
    for glob in written_out([keep] if isinstance(keep, str) else keep):
        hits = {name for name, short in plain.items() if matches(glob, name) or matches(glob, short)}
        if not hits:
            forms = dict.fromkeys(re.sub(r"\b\d+\b", "*", short) for short in plain.values())
            raise QkvError(f"no weight that could be packed matches {glob!r}{nearest(glob, forms)}")
        kept |= hits
    return [name for name in plain if name not in kept]


def check(name: str, weight: Tensor) -> None:
    """Refuse numbers that the scales of blocks cannot hold."""
    low, high = (weight.dequantise() if isinstance(weight, Packed) else weight).detach().aminmax()
    if not (low >= -LARGEST and high <= LARGEST):
        raise QkvError(f"{name} holds a weight that is not finite, or above {LARGEST:,.0f}: it cannot be quantised")


def bits(weight: Tensor) -> float:
    """Of one weight."""
    return 8 * length(weight) / weight.numel()


def length(weight: Tensor) -> int:
    """In bytes."""
    kept = weight.blocks if isinstance(weight, Packed) else weight
    return kept.numel() * kept.element_size()


def size(model: nn.Module) -> int:
    """The bytes of all parameters; one that several parts share counts once."""
    return sum(map(length, model.parameters()))
