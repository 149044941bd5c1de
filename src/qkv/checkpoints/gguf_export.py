"""Back out to GGUF, for llama.cpp."""

import dataclasses as dc
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.checkpoints.directory import Directory
from qkv.checkpoints.export import published, unpooled
from qkv.checkpoints.gguf_model import GGUFModel, configuration, shortest
from qkv.checkpoints.gguf_rope import turning
from qkv.checkpoints.gguf_tokenizer import tokenizer_metadata
from qkv.checkpoints.gguf_write import Typed, write_gguf
from qkv.checkpoints.load import Origin
from qkv.checkpoints.names import parse, write
from qkv.checkpoints.weights import read_json
from qkv.errors import QkvError
from qkv.masks import Full
from qkv.models import Model, Module, Sequence
from qkv.ops.blocks import BLOCKS
from qkv.ops.blocks.packed import Packed
from qkv.parts import Attention, FeedForward, Mamba, Rotary, Vector
from qkv.parts.position import LinearScaling
from qkv.spec import Change, diff, nearest
from qkv.zoo.config import Config
from qkv.zoo.gguf import ALWAYS_F32, FILE_TYPES, POOLING, Architecture, architecture_for
from qkv.zoo.registry import family_of, spec_from
from qkv.zoo.solve import configuration as solved

INHERITED = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
"""What another file's `general.*` says of itself alone."""
NO_TOKENIZER = {"tokenizer.ggml.model": "none"}
SEGMENTS = "token_types.weight"


@dc.dataclass(frozen=True)
class Exported:
    """What was written: how many tensors of each type, and those whose rows no blocks of the type fit."""

    path: Path
    types: dict[str, int]
    instead: dict[str, str]
    """Name → the type that it has instead of the one asked for."""
    tokenizer: bool
    """Whether the file can turn text into tokens."""
    lack: str | None = None
    """Why it cannot, where there was a tokenizer."""


def save_gguf(
    model: Module, path: Path | str, tokenizer_metadata: Mapping[str, Any] | None = None, type: str = "F16"
) -> Exported:
    """Write a model as one .gguf file, its matrices as F32, F16, BF16, Q8_0, Q4_0 or Q4_1.

    As llama.cpp has it, norms, biases and other vectors are F32, rows that are no multiple of 32 are F16 instead of
    blocks, and the table that makes the logits is never below Q8_0. `tokenizer_metadata` are the keys `tokenizer.*`;
    without them those of the file that the model was loaded from are taken, or made from the tokenizer.json beside it.
    Raises QkvError, and writes nothing, where the format cannot say what the model is.
    """
    if type not in FILE_TYPES:
        raise QkvError(
            f"{path}: weights can be written as {', '.join(FILE_TYPES)}, not as {type!r}{nearest(type, FILE_TYPES)}"
        )
    spec, values = unpooled(model.spec), configured(model)
    architecture = architecture_for(values["model_type"])
    table = parse(architecture.tables(spec)[0])
    shapes = {name: tuple(x.shape) for name, x in write(table, on_meta(model))}
    says, factors = facts(architecture, values, spec)
    says |= pooled(model.spec)
    check(architecture, says, {**shapes, **{name: x.shape for name, x in factors.items()}}, factors, spec)
    types = {name: type_of(name, shape, type, tied="output.weight" not in shapes) for name, shape in shapes.items()}
    tokens, lack = tokenizer_metadata, None
    if tokens is None:
        try:
            tokens = tokenizer_of(model, shapes["token_embd.weight"][0])
        except QkvError as fault:
            lack = str(fault)
    counted = {"tokenizer.ggml.token_type_count": shapes[SEGMENTS][0]} if SEGMENTS in shapes else {}
    metadata = {
        "general.architecture": architecture.name,
        **general(model),
        "general.file_type": FILE_TYPES[type],
        "general.quantization_version": 2,
        **{f"{architecture.name}.{key}": value for key, value in says.items()},
        **(typed(tokens) if tokens else NO_TOKENIZER),
        **counted,
    }

    def tensors() -> Iterator[tuple[str, str, Tensor]]:
        yield from ((name, "F32", x) for name, x in factors.items())
        for name, x in write(table, model.state_dict()):
            yield name, types[name], x.dequantise() if isinstance(x, Packed) else x

    write_gguf(path, metadata, tensors())
    other = {name: one for name, one in types.items() if one not in (type, "F32")}
    counts = Counter([*types.values(), *("F32" for _ in factors)])
    return Exported(Path(path), dict(counts), other, NO_TOKENIZER.items().isdisjoint(metadata.items()), lack)


def type_of(name: str, shape: tuple[int, ...], wanted: str, *, tied: bool) -> str:
    """The type of a tensor in a file whose matrices are of a type."""
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(("_norm.weight", *ALWAYS_F32)):
        return "F32"
    if wanted in ("Q4_0", "Q4_1") and name == ("token_embd.weight" if tied else "output.weight"):
        wanted = "Q8_0"
    return "F16" if shape[-1] % BLOCKS[wanted].weights else wanted


def on_meta(model: Module) -> dict[str, Tensor]:
    return {name: torch.empty(x.shape, device="meta") for name, x in model.state_dict().items()}


# --- metadata of the model ---


class Asked(Config):
    """A configuration that remembers what a family read from it, its own defaults included."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.read: dict[str, Any] = {}

    def value(self, key: str, default: Any, kind: type[Any]) -> Any:
        self.read[key] = super().value(key, default, kind)
        return self.read[key]


def configured(model: Module) -> dict[str, Any]:
    """The config.json of a model, complete."""
    origin = model.origin
    values = solved(unpooled(model.spec), origin.source.config) if isinstance(origin, Origin) else published(model)[0]
    asked = Asked(values)
    family_of(values).spec(asked)
    return {**values, **asked.read}


def facts(architecture: Architecture, values: dict[str, Any], spec: Model) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What stands behind the architecture's name in the metadata, and the tensors that belong to it."""
    heads, keys = attentions(spec), architecture.keys
    values, rope, factors = {**values, **sizes(spec)}, {}, {}
    if heads:
        assert isinstance(spec, Sequence)
        wide = next((one for one in heads if one.mask == Full()), heads[0])
        near = next((one for one in heads if one.mask != Full()), None)
        head = wide.head_width or spec.width // wide.heads
        values |= {"head_dim": head, "num_key_value_heads": wide.kv_heads or wide.heads}
        if isinstance(wide.position, Rotary):
            said = turning(wide.position, head)
            rope, factors = said.keys, said.factors
            values |= {"rope_theta": wide.position.theta, "rotary_width": int(head * wide.position.fraction)}
        if near is not None and isinstance(near.position, Rotary):
            values["rope_local_base_freq"] = near.position.theta
    if values.get("layer_types"):
        values["sliding_window_pattern"] = period(values["layer_types"])
    says = {
        key: values[at]
        for key, at in keys.rows
        if values.get(at) is not None and (at not in keys.usual or keys.usual[at] != values[at])
    }
    asked = {key: value for key, value in keys.inert.items() if value is not None}
    return {**says, **keys.fixed, **asked, **rope}, factors


def sizes(spec: Model) -> dict[str, Any]:
    """What a config.json may leave to be computed."""
    if not isinstance(spec, Sequence):
        return {}
    found: dict[str, Any] = {}
    for branch in spec.stack.blocks[0].branches.values():
        if isinstance(branch.f, FeedForward):
            found["n_inner"] = branch.f.hidden
        if isinstance(branch.f, Mamba):
            found["time_step_rank"] = branch.f.rank or -(-spec.width // 16)
    return found


def pooled(spec: Model) -> dict[str, int]:
    """How one vector is made of a text, where the model does that."""
    head = spec.head if isinstance(spec, Sequence) else None
    if not isinstance(head, Vector) or head.pool.transform is not None:
        return {}
    if head.pool.take not in POOLING:
        raise QkvError(f"GGUF has no form for vectors that are the {head.pool.take} over a text's tokens")
    return {"pooling_type": POOLING[head.pool.take]}


def period(kinds: list[str]) -> int:
    """Every which layer sees more than a window: 6 where the layers are too few to tell."""
    fits = (
        n
        for n in (6, *range(1, len(kinds) + 1))
        if all((i % n == n - 1) == (k == "full_attention") for i, k in enumerate(kinds))
    )
    return next(fits, 6)


def attentions(spec: Model) -> list[Attention]:
    if not isinstance(spec, Sequence):
        return []
    return [b.f for layer in spec.stack.layers for b in layer.branches.values() if isinstance(b.f, Attention)]


def check(
    architecture: Architecture,
    says: Mapping[str, Any],
    shapes: Mapping[str, Any],
    factors: Mapping[str, Tensor],
    spec: Model,
) -> None:
    """Read back what is about to be written: `QkvError` says where it would be another model."""
    listed = {name: shortest(x.tolist()) for name, x in factors.items()}
    back = spec_from(configuration(architecture, says, shapes, listed, "the file"))
    left = [change for change in diff(spec, back) if not means_the_same(change)]
    for before, after in zip(attentions(spec), attentions(back), strict=not left):
        if isinstance(spec, Sequence) and not turn_alike(before, after, spec.width):
            left.append(Change("position", before.position, after.position))
    if left:
        raise QkvError(f"GGUF has no form for this {architecture.kind} model, which would be read back with {left[0]}")


def means_the_same(change: Change) -> bool:
    """Whether two specs compute the same for all of a difference: in evaluation, and in 32 bits."""
    name, (before, after) = change.path.rpartition(".")[2], (change.before, change.after)
    if name in ("dropout", "survival", "fraction") or ".position.scaling" in change.path:
        return True  # rotary positions are compared by what they do
    if name in ("head_width", "kv_heads"):
        return before is None or after is None  # one says what the other leaves to the width and the heads
    return isinstance(before, float) and isinstance(after, float) and abs(before - after) <= 1e-6 * abs(before)


def turn_alike(a: Attention, b: Attention, width: int) -> bool:
    """Whether two rotary positions have the same rates, at the shortest text and at the longest."""
    x, y = rates(a, width), rates(b, width)
    return x.shape == y.shape and torch.allclose(x, y, rtol=1e-5)


def rates(attention: Attention, width: int) -> Tensor:
    """The rates at both ends, and what they are multiplied by."""
    if not isinstance(attention.position, Rotary):
        return torch.zeros(())
    rotary, head = attention.position, attention.head_width or width // attention.heads
    scaling, turned = rotary.scaling or LinearScaling(1.0), int(head * rotary.fraction)
    ends = [torch.full((1, 1, 1), length) for length in (1.0, 1e9)]
    return torch.cat(
        [*(scaling.rates(rotary.theta, turned, n).flatten() for n in ends), torch.tensor([scaling.magnitude])]
    )


def general(model: Module) -> dict[str, Any]:
    """What the file is called, and what the file before it said of itself."""
    source = model.origin.source if isinstance(model.origin, Origin) else None
    said = source.file.metadata if isinstance(source, GGUFModel) else {}
    kept = {
        key: value for key, value in said.items() if key.startswith("general.") and key not in INHERITED and value != []
    }
    name = source.path.resolve().name.removesuffix(".gguf") if source is not None else type(model.spec).__name__
    return {"general.type": "model", "general.name": name, **kept}


# --- metadata of the tokenizer ---


def typed(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """With the widths that llama.cpp reads; a list without elements has none and is left out."""
    widths = {"tokenizer.ggml.token_type": "int32", "tokenizer.ggml.scores": "float32"}
    kept = {key: value for key, value in metadata.items() if value != []}
    return {key: Typed(widths[key], value) if key in widths else value for key, value in kept.items()}


def tokenizer_of(model: Module, size: int) -> dict[str, Any] | None:
    """The keys of the file that the model was loaded from, or of the tokenizer.json beside its weights."""
    source = model.origin.source if isinstance(model.origin, Origin) else None
    if isinstance(source, GGUFModel):
        return {key: value for key, value in source.file.metadata.items() if key.startswith("tokenizer.")}
    if not isinstance(source, Directory) or not (source.path / "tokenizer.json").is_file():
        return None
    beside, template = source.path / "tokenizer_config.json", source.path / "chat_template.jinja"
    config = read_json(beside) if beside.is_file() else {}
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    return tokenizer_metadata(read_json(source.path / "tokenizer.json"), config, size)
