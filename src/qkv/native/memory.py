"""Memories of matrices as records: products, convolutions, features, decays, and the recurrence."""

from typing import Any

import torch
from torch import Tensor

from qkv.native.builder import Add, Builder, Fields, Read, Unlowered, norm_fields
from qkv.native.library import ACTS, FeatureKind, Kind, NormKind, RuleKind
from qkv.native.mixers import act, convolve, lowers, place, reach, turns
from qkv.parts.linear import Linear
from qkv.parts.mixers.memory import Add as Sum
from qkv.parts.mixers.memory import (
    Delta,
    Exponential,
    Memory,
    PerChannel,
    PerHead,
    PerToken,
    Pointwise,
    Positive,
    Softmax,
    StepSize,
    Tied,
    Unit,
)
from qkv.parts.mixers.memory.decay import Project
from qkv.parts.mixers.rwkv6 import STREAMS, ChannelMix, Rwkv6
from qkv.parts.position import Rotary


@lowers(Memory)
def memory(build: Builder, body: Any, read: Read, add: Add) -> None:
    """A row holds v, k, q and a gate; where the decay makes the key, what it is made of stands in its place."""
    spec, gate, tied = body.spec, body.gate, body.k is None
    remembers(build)
    values, keys = spec.heads * body.value_width, body.groups * body.key_width
    layers, whole = [body.v, body.decay.gate.up if tied else body.k, body.q], values + 2 * keys
    beside = gate is not None and gate.down is None
    every = build.buffer("v, k, q and gate", whole + values * beside)
    build.linear([*layers, gate.up] if beside else layers, read, Add(every))
    gated: Fields = {"gate": every, "gate_at": whole}
    if gate is not None and not beside:
        gated = {"gate": project(build, gate, read, "gate")}
    x = every if spec.conv is None else build.buffer("v, k and q", whole)
    if spec.conv is not None:
        convolve(build, [body.v_conv], every, 0, Add(x))
        at, layers = (values + keys, [body.q_conv]) if tied else (values, [body.k_conv, body.q_conv])
        convolve(build, layers, every, at, Add(x), "identity")
    written = rule(build, body, read)
    decays = decay(build, body, read, every, x)
    features(build, body, x, values)
    mixed = build.buffer("mixed", values)
    state = values * body.key_width + (spec.heads * (body.key_width + 1) if spec.rule.column else 0)
    build.add(Kind.RECALL, **{"in": x}, out=mixed, heads=spec.heads, groups=body.groups, head_width=body.value_width,
              states=body.key_width, scale=body.key_width**-0.5, **written, **decays,
              **({**gated, "act": ACTS.index(act(spec.gate))} if spec.gate else {}),
              **(head_norms(build, body.norm, spec.heads) if body.norm is not None else {}),
              state_at=build.state(state))  # fmt: skip
    build.linear([body.o], Read(mixed), add)


def remembers(build: Builder) -> None:
    """Refuse documents in one row, for which there is no kernel."""
    if not reach(build.mask)["behind"]:
        raise Unlowered(f"a memory of no more than a token, as the mask {build.mask} has it")


def head_norms(build: Builder, norm: Any, heads: int) -> Fields:
    fields = norm_fields(build, norm)
    return {name: one.repeat(heads) if name in ("norm_weight", "norm_bias") else one for name, one in fields.items()}


def product(build: Builder, layer: Linear, read: Read, add: Add, bias: Tensor | None = None, **more: Any) -> None:
    """W x + b, where b is not the layer's own."""
    if layer.adapters:
        raise Unlowered("an adapter: merge it first")
    build.product([layer.weight], read, add, len(layer.weight), bias, **more)


def project(build: Builder, layer: Project, read: Read, name: str, sign: float = 1.0, **more: Any) -> int:
    """act(± (W x + b)), through a rank if there is one, in the buffer of that name."""
    if layer.down is not None:
        low = build.buffer("low rank", len(layer.down.weight))
        build.linear([layer.down], read, Add(low))
        read = Read(low)
    out = build.buffer(name, len(layer.up.weight))
    bias = None if layer.bias is None else sign * layer.bias
    product(build, layer.up, read, Add(out), bias, scale=sign, **more)
    return out


def capped(cap: float | None) -> Fields:
    return {} if cap is None else {"act": "softcap", "softcap": cap}


def rule(build: Builder, body: Any, read: Read) -> Fields:
    """How a token is written, and what its answer is divided by."""
    spec = body.spec.rule
    match spec:
        case Sum():
            return {"rule": RuleKind.MEAN if spec.normalise else RuleKind.SUM, "least": spec.eps, "writes": -1}
        case Delta():
            rate = project(build, body.rule.rate, read, "writes", act="sigmoid")
            return {"rule": RuleKind.DELTA, "most": spec.most, "writes": rate}
        case Exponential():
            exponents = project(build, body.rule.gate, read, "writes", **capped(spec.cap))
            build.buffer("writes", 2 * body.spec.heads)  # beside them, what its answers are divided by
            return {"rule": RuleKind.EXPONENTIAL, "least": spec.eps, "writes": exponents}
    raise Unlowered(f"the rule {spec}")


def decay(build: Builder, body: Any, read: Read, every: int, x: int) -> Fields:
    """What is left of a memory from token to token: a constant, or a buffer, made from `steps` for each row.

    A tied key goes from logits in `every` to its place in `x`.
    """
    spec, heads, width = body.spec.decay, body.spec.heads, body.key_width
    exponential = isinstance(body.spec.rule, Exponential)
    shares = 1 if isinstance(spec, PerToken) or (isinstance(spec, StepSize) and not spec.rank) else width
    fields: Fields = {"heads": heads, "groups": heads, "shares": shares, "keys": -1, "act": ACTS.index("softplus")}
    match spec:
        case None | PerHead():
            kept = torch.zeros(heads) if spec is None else body.decay(torch.zeros(1))
            steps = build.buffer("steps", heads) if exponential else -1
            return {"steps": steps, "shares": 1, "decay": build.floats(kept)}
        case PerToken():
            steps = project(build, body.decay.gate, read, "steps", sign=-1.0, **capped(spec.cap))
            fields |= {"in": steps, "decay": torch.full((heads,), -1 / spec.temperature)}
        case PerChannel():
            steps = project(build, body.decay.gate, read, "steps", sign=-1.0)
            fields |= {"in": steps, "decay": torch.full((heads,), -1 / spec.temperature)}
        case StepSize():
            steps = project(build, body.decay.step, read, "steps")
            fields |= {"in": steps, "decay": build.floats(-body.decay.A_log.float().exp())}
        case Tied() if not exponential:
            steps = build.buffer("steps", heads * width)
            fields |= {"in": every, "in_at": heads * body.value_width, "keys": x, "most": 1 - spec.floor}
            fields |= {"groups": body.groups}
        case _:
            raise Unlowered(f"the decay {spec} with the rule {body.spec.rule}")
    build.add(Kind.DECAY, **fields, steps=steps, rule=RuleKind.EXPONENTIAL if exponential else RuleKind.SUM)
    return {"steps": steps, "shares": shares}


def features(build: Builder, body: Any, x: int, at: int) -> None:
    """Keys and queries side by side, mapped and turned; a tied key is turned only."""
    position = place(body.position)
    if position is not None and not isinstance(position.spec, Rotary):
        raise Unlowered(f"the position {position.spec} of a memory")
    turned, mapped, groups = turns(build, position), feature(body.spec.feature), body.groups
    heads = [turned, {**mapped, **turned}] if body.k is None else [{**mapped, **turned}]
    for fields in heads:
        if fields:
            count = 2 * groups // len(heads)
            build.add(Kind.FEATURE, **{"in": x}, in_at=at, heads=count, head_width=body.key_width, **fields)
        at += groups * body.key_width


def feature(spec: Any) -> Fields:
    match spec:
        case None:
            return {}
        case Pointwise():
            return {"feature": FeatureKind.POINTWISE, "act": ACTS.index(act(spec.act))}
        case Positive():
            return {"feature": FeatureKind.POSITIVE}
        case Softmax():
            return {"feature": FeatureKind.SOFTMAX}
        case Unit():
            return {"feature": FeatureKind.UNIT, "act": ACTS.index(act(spec.act)), "eps": spec.eps}
    raise Unlowered(f"the feature {spec}")


# --- RWKV-6 ---


@lowers(Rwkv6)
def rwkv6(build: Builder, body: Any, read: Read, add: Add) -> None:
    """A row holds v, k and q; each is made of its own mixture of a token and the one before."""
    spec, width, rank = body.spec, len(body.norm_weight), body.spec.mix_rank
    remembers(build)
    x, back, shifted = (build.buffer(name, width) for name in ("own", "back", "shifted"))
    low, streams = build.buffer("low rank", STREAMS * rank), build.buffer("streams", STREAMS * width)
    every, gate, steps = (build.buffer(*one) for one in (("v, k and q", 3 * width), ("gate", width), ("steps", width)))
    build.normalise(read.norm, read.buffer, Add(x))
    one = torch.ones(width)
    shift(build, x, back, one, -one)
    shift(build, x, shifted, body.mix_all, 1 - body.mix_all)
    build.product([body.mix_down], Read(shifted), Add(low), STREAMS * rank, act="tanh")
    for n, (up, bias) in enumerate(zip(body.mix_up.split(rank, 1), body.mix, strict=True)):
        build.product([up.detach().contiguous()], Read(low), Add(streams), width, bias, at=n * width, in_at=n * rank)
    build.add(Kind.MIX, **{"in": streams}, out=streams, keys=back, residual=x, inputs=width, groups=STREAMS)
    for n, layer, out, at in (
        (0, body.r, every, 2 * width), (2, body.k, every, width), (3, body.v, every, 0), (4, body.g, gate, 0)
    ):  # fmt: skip
        product(build, layer, Read(streams), Add(out), at=at, in_at=n * width)
    product(build, body.decay_down, Read(streams), Add(low), act="tanh", in_at=width)
    product(build, body.decay_up, Read(low), Add(steps), body.decay)
    mixed, K = build.buffer("mixed", width), width // spec.heads
    build.add(Kind.DECAY, **{"in": steps}, steps=steps, keys=-1, heads=spec.heads, groups=spec.heads, shares=K,
              decay=-torch.ones(spec.heads), rule=RuleKind.BONUS)  # fmt: skip
    build.add(Kind.RECALL, **{"in": every}, out=mixed, steps=steps, writes=-1, gate=gate, act=ACTS.index("silu"),
              heads=spec.heads, groups=spec.heads, head_width=K, states=K, shares=K, rule=RuleKind.BONUS,
              skip=build.floats(body.u), norm=NormKind.LAYER, eps=spec.eps, norm_weight=build.floats(body.norm_weight),
              norm_bias=build.floats(body.norm_bias), state_at=build.state(width * K))  # fmt: skip
    build.linear([body.o], Read(mixed), add)


@lowers(ChannelMix)
def channel_mix(build: Builder, body: Any, read: Read, add: Add) -> None:
    width = len(body.k_mix)
    remembers(build)
    x, shifted, gate, out = (build.buffer(name, width) for name in ("own", "shifted", "gate", "mixed"))
    hidden = build.buffer("hidden", body.spec.hidden)
    build.normalise(read.norm, read.buffer, Add(x))
    shift(build, x, shifted, body.k_mix, 1 - body.k_mix)
    build.linear([body.k], Read(shifted), Add(hidden), act="relu")
    build.add(Kind.MIX, **{"in": hidden}, out=hidden, keys=hidden, residual=-1, inputs=body.spec.hidden, groups=1)
    build.linear([body.v], Read(hidden), Add(out))
    shift(build, x, shifted, body.r_mix, 1 - body.r_mix)
    build.linear([body.r], Read(shifted), Add(gate), act="sigmoid")
    build.add(Kind.MIX, **{"in": gate}, out=add.buffer, keys=out, residual=add.residual, inputs=width, groups=1)


def shift(build: Builder, source: int, out: int, before: Tensor, own: Tensor) -> None:
    """before ⊙ the token before + own ⊙ the token itself: a convolution over both."""
    width = len(own)
    build.add(Kind.CONVOLVE, **{"in": source}, out=out, inputs=width, taps=2,
              weight=build.floats(torch.stack((before, own))), state_at=build.state(width))  # fmt: skip
