"""Small models around every registered part: a new part joins the contracts by being registered."""

import dataclasses as dc
from typing import Any

import torch
from torch import nn

from qkv import models, parts, zoo  # noqa: F401 - registers what is tested
from qkv.masks import Causal, Full, Global, Mask, Prefix, Window
from qkv.models import EncoderDecoder, Module, Sequence
from qkv.parts import (
    GLA,
    GRU,
    Attention,
    Block,
    Branch,
    ChannelMix,
    Decay,
    Delta,
    DyT,
    Experts,
    Feature,
    FeedForward,
    Gate,
    Head,
    LayerNorm,
    LayerScale,
    Learned,
    Mamba2,
    Memory,
    Mixer,
    Norm,
    Parallel,
    Position,
    PositionEmbedding,
    Relative,
    Rotary,
    Rule,
    Rwkv6,
    Score,
    Shared,
    Softmax,
    Stack,
    Tokens,
    Unit,
)
from qkv.spec import KINDS, Spec, dump, edit, kinds, load
from qkv.zoo import PRESETS, spec_of

VOCAB, WIDTH, ROOM = 23, 16, 40


def example(cls: type[Spec]) -> Spec:
    """A part with its required fields filled in."""
    fill = {int: 4, str: "table", Mixer: GRU(6)}
    required = [field for field in dc.fields(cls) if field.default is dc.MISSING]
    long = {field.name for field in required if field.name == "tokens" or issubclass(cls, PositionEmbedding)}
    return cls(**{field.name: ROOM if field.name in long else fill[field.type] for field in required})


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
    found |= {f"mixer {m.kind}": decoder(m, at=Learned(ROOM)) for m in examples(Mixer) if m.incremental}
    found |= {f"decay {d.kind}": decoder(Memory(4, decay=d, rule=Delta(), feature=Unit())) for d in examples(Decay)}
    found |= {f"rule {r.kind}": decoder(Memory(4, groups=2, rule=r, conv=3, feature=Softmax())) for r in examples(Rule)}
    found |= {f"feature {x.kind}": decoder(Memory(4, feature=x, position=Rotary())) for x in examples(Feature)}
    found["time mix and channel mix"] = decoder(
        block=Block(attn=Branch(Rwkv6(4), pre=LayerNorm()), ffn=Branch(ChannelMix(24), pre=LayerNorm()))
    )
    found |= {f"router {r.kind}": decoder(parts.Experts(8, count=4, router=r)) for r in examples(parts.Router)}
    found["experts with a capacity and a shared one"] = decoder(
        parts.Experts(8, count=4, shared=parts.Gated(8), capacity=0.5)
    )
    attn, ffn = Branch(Attention(4, kv_heads=2), pre=LayerNorm()), Branch(FeedForward(24))
    found["grouped queries, parallel"] = decoder(block=Parallel(attn=attn, ffn=ffn), at=Learned(ROOM))
    found["one key-value head, norm of queries"] = decoder(Attention(4, kv_heads=1, norm=LayerNorm()))
    ends: dict[str, Any] = {"out": LayerNorm(), "gate": LayerScale()}
    found["norms of queries, and branches that end in a norm and a gate"] = decoder(
        block=Block(attn=Branch(Attention(4, norm=DyT()), **ends), ffn=Branch(Experts(8, count=4), **ends))
    )
    found["memories that end in a norm and a gate"] = decoder(
        block=Block(one=Branch(GLA(4), **ends), two=Branch(Mamba2(4, state=8), **ends))
    )
    found["window and sinks"] = decoder(Attention(4, mask=Window(3) | Global(2)), at=Learned(ROOM))
    found["window in every other layer"] = edit(decoder(at=Learned(ROOM)), "stack.1.attn.f.mask", Window(3))
    shared = Stack(decoder().stack.pattern, depth=4, use=(0, 0, 1, 1))
    found["shared layers"] = Sequence(WIDTH, embed=Tokens(vocab=VOCAB), stack=shared, head=Head(tied=True))
    for name in PRESETS:
        spec = shrunk(name)
        if isinstance(spec, Sequence) and spec.mask.causal:
            found[name] = spec
    return found


def encoders() -> dict[str, Sequence]:
    """Every mixer where it sees both sides."""
    return {f"mixer {m.kind}": decoder(m, at=Learned(ROOM), mask=Full()) for m in examples(Mixer)}


def shrunk(name: str) -> models.Model:
    """A preset with few layers, small widths and a small vocabulary."""
    return load(small(dump(spec_of(name)), top=True))


SMALL = {
    "heads": 4, "head_width": 4, "hidden": 24, "state": 8, "count": 3, "inner": 24, "scaling": None, "fraction": 0.5,
    "key_width": 4, "value_width": 6,
}  # fmt: skip


def small(value: Any, top: bool = False) -> Any:
    """A spec as plain data, its sizes made small, with one layer of each kind, and at least two."""
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
        kinds = [layer for n, layer in enumerate(layers) if layer not in layers[:n]]
        kinds = kinds if len(kinds) > 1 else kinds * 2
        made |= {"depth": len(kinds), "pattern": kinds, **({"use": [0, 0]} if made.get("use") else {})}
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
