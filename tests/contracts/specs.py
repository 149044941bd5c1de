"""Small models around every registered part: a new part joins the contracts by being registered."""

import dataclasses as dc
from typing import Any

import torch
from torch import nn

from qkv import models, parts, zoo  # noqa: F401 - registers what is tested
from qkv.masks import Causal, Mask, Prefix, Window
from qkv.models import EncoderDecoder, Module, Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    FeedForward,
    Gate,
    Head,
    LayerNorm,
    Learned,
    Mixer,
    Norm,
    Parallel,
    Position,
    PositionEmbedding,
    Relative,
    Score,
    Shared,
    Stack,
    Tokens,
)
from qkv.spec import KINDS, Spec, dump, edit, kinds, load
from qkv.zoo import PRESETS, spec_of

VOCAB, WIDTH, ROOM = 23, 16, 40


def example(cls: type[Spec]) -> Spec:
    """A part with its required fields filled in."""
    fill = {int: 4, str: "table"}
    required = [field for field in dc.fields(cls) if field.default is dc.MISSING]
    size = ROOM if issubclass(cls, PositionEmbedding) else 4
    return cls(**{field.name: size if field.type is int else fill[field.type] for field in required})


def examples(base: type[Spec]) -> list[Spec]:
    return [example(KINDS[kind]) for kind in kinds(base)]


def decoder(
    f: Mixer | None = None,
    norm: Norm | None = None,
    at: PositionEmbedding | None = None,
    gate: Gate | None = None,
    mask: Mask | None = None,
    block: Block | None = None,
) -> Sequence:
    norm = norm or LayerNorm()
    block = block or Block(
        attn=Branch(f or Attention(4), pre=norm, gate=gate), ffn=Branch(FeedForward(24), pre=norm, gate=gate)
    )
    return Sequence(
        WIDTH,
        embed=Tokens(vocab=VOCAB, position=at),
        stack=Stack(block, depth=3, shared={"table": Relative(buckets=8, far=16)}),
        mask=mask or Causal(),
        norm=norm,
        head=Head(),
    )


def decoders() -> dict[str, Sequence]:
    found = {f"norm {norm.kind}": decoder(norm=norm, at=Learned(ROOM)) for norm in examples(Norm)}
    found |= {f"position {p.kind}": decoder(Attention(4, position=p)) for p in examples(Position)}
    found |= {f"embedding {p.kind}": decoder(at=p) for p in examples(PositionEmbedding)}
    found |= {f"score {s.kind}": decoder(Attention(4, score=s, position=Shared("table"))) for s in examples(Score)}
    found |= {f"gate {gate.kind}": decoder(gate=gate) for gate in examples(Gate)}
    found |= {f"mixer {mixer.kind}": decoder(mixer, at=Learned(ROOM)) for mixer in examples(Mixer)}
    attn, ffn = Branch(Attention(4, kv_heads=2), pre=LayerNorm()), Branch(FeedForward(24))
    found["grouped queries, parallel"] = decoder(block=Parallel(attn=attn, ffn=ffn), at=Learned(ROOM))
    found["one key-value head, norm of queries"] = decoder(Attention(4, kv_heads=1, norm=LayerNorm()))
    found["window in every other layer"] = edit(decoder(at=Learned(ROOM)), "stack.1.attn.f.mask", Window(3))
    shared = Stack(decoder().stack.pattern, depth=4, use=(0, 0, 1, 1))
    found["shared layers"] = Sequence(WIDTH, embed=Tokens(vocab=VOCAB), stack=shared, head=Head(tied=True))
    for name in PRESETS:
        spec = shrunk(name)
        if isinstance(spec, Sequence) and spec.mask.causal:
            found[name] = spec
    return found


def shrunk(name: str) -> models.Model:
    """A preset with few layers, small widths and a small vocabulary."""
    return load(small(dump(spec_of(name)), top=True))


SMALL = {
    "heads": 4, "head_width": 4, "hidden": 24, "state": 8, "count": 3, "inner": 24, "scaling": None, "fraction": 0.5,
}  # fmt: skip


def small(value: Any, top: bool = False) -> Any:
    """A spec as plain data, its sizes made small; what tells layers apart is kept in the first and the last."""
    if isinstance(value, list):
        return [small(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {key: SMALL[key] if key in SMALL and item else small(item) for key, item in value.items()}
    if "width" in made:
        made["width"] = WIDTH if top else 8
    if made.get("kv_heads"):
        made["kv_heads"] = 1 if made["kv_heads"] == 1 else 2
    if made.get("kind") == "stack":
        layers = made["pattern"] if isinstance(made["pattern"], list) else [made["pattern"]]
        made |= {"depth": 2, "pattern": [layers[0], layers[-1]], **({"use": [0, 0]} if made.get("use") else {})}
    if made.get("kind") == "tokens":
        made["vocab"] = VOCAB
    if made.get("kind") in ("window", "learned"):
        made["size"] = 3 if made["kind"] == "window" else ROOM + made.get("offset", 0)
    return made


def pairs() -> dict[str, EncoderDecoder]:
    return {name: spec for name in PRESETS if isinstance(spec := shrunk(name), EncoderDecoder)}


def prefix_decoder() -> Sequence:
    return decoder(mask=Causal() | Prefix(), at=Learned(ROOM))


def rough(spec: models.Model, seed: int = 0) -> Module:
    """The model in fp64 with weights of standard deviation 0.3: at 0.02 almost anything passes."""
    torch.manual_seed(seed)
    model = spec.build().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.3)
    return model
