"""What stands in a branch, as records. A part that is not here leaves its model to torch.

A lowering is called `lower(build, body, read, add)`: it reads `read` (a buffer, and the norm that comes first) and
writes to, or adds to, what `add` names. Another package's part registers its own with `lowers`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qkv.context import Context
from qkv.masks import All, Causal, Full, Mask, Window
from qkv.native.builder import Add, Builder, Fields, Read, Unlowered, norm_fields
from qkv.native.library import ACTS, FAR, Kind, NormKind
from qkv.parts.experts import Experts, TopK
from qkv.parts.feedforward import FeedForward, Gated
from qkv.parts.linear import Linear
from qkv.parts.mixers import Attention, Body, Mamba, Mamba2
from qkv.parts.position import ALiBi, BandScaling, EndpointScaling, LinearScaling, Positional, Relative, Rotary, YaRN
from qkv.parts.position.position import SharedPosition
from qkv.spec import Spec

Lower: TypeAlias = Callable[["Builder", Any, Read, Add], None]
LOWERED: dict[type, Lower] = {}


def lowers(kind: type[Spec]) -> Callable[[Lower], Lower]:
    """Register the lowering of what stands in a branch."""

    def register(lower: Lower) -> Lower:
        LOWERED[kind] = lower
        return lower

    return register


def lower(build: Builder, body: Body, read: Read, add: Add) -> None:
    kind = type(getattr(body, "spec", body))
    if kind not in LOWERED:
        raise Unlowered(f"the mixer {kind.__name__}")
    LOWERED[kind](build, body, read, add)


@lowers(FeedForward)
def feedforward(build: Builder, body: Any, read: Read, add: Add) -> None:
    hidden = build.buffer("hidden", body.spec.hidden)
    build.linear([body.up], read, Add(hidden), act=act(body.spec.act))
    build.linear([body.down], Read(hidden), add)


@lowers(Gated)
def gated(build: Builder, body: Any, read: Read, add: Add) -> None:
    hidden = build.buffer("hidden", body.spec.hidden)
    build.linear([body.gate, body.up], read, Add(hidden), act=act(body.spec.act), gated=True)
    build.linear([body.down], Read(hidden), add)


def act(name: str) -> str:
    if name not in ACTS:
        raise Unlowered(f"the activation {name}")
    return name


@lowers(Attention)
def attention(build: Builder, body: Any, read: Read, add: Add) -> None:
    spec, heads, groups, width = body.spec, body.spec.heads, body.groups, body.head_width
    dot = body.score.dot
    if dot is None:
        raise Unlowered(f"the score {spec.score}")
    queries = build.buffer("queries", (heads + 2 * groups) * width)
    mixed = build.buffer("mixed", heads * width)
    cross = spec.over is not None
    common: Fields = {"heads": heads, "groups": groups, "head_width": width, "memory": cross}
    fields: Fields = {**common, "scale": width**-0.5 if dot.scale is None else dot.scale, **key_norms(build, body)}
    if cross:
        build.linear([body.q], read, Add(queries))
        keys, values = build.memory_cache(body)
        build.add(Kind.KEYS, **{"in": queries}, **{**fields, "groups": 0})
    else:
        build.linear([body.q, body.k, body.v], read, Add(queries))
        keys, values = build.own_cache(groups, width)
        common |= reach(build.mask & spec.mask)
        common |= distances(build, body.position, heads)
        build.add(Kind.KEYS, **{"in": queries}, **fields, keys_at=keys, values_at=values, **turns(build, body.position))
    build.add(Kind.ATTEND, **{"in": queries}, out=mixed, **common, keys_at=keys, values_at=values,
              softcap=dot.softcap or 0.0)  # fmt: skip
    build.linear([body.o], Read(mixed), add)


@lowers(Experts)
def experts(build: Builder, body: Any, read: Read, add: Add) -> None:
    """Scores, a choice, what each chosen expert makes, and their sum, to which shared experts add."""
    spec, router = body.spec, body.spec.router
    if not isinstance(router, TopK):
        raise Unlowered(f"the router {router}")
    inner = body.down.shape[1]
    logits, routes = build.buffer("router", spec.count), build.buffer("routes", 2 * router.k)
    hidden, made = build.buffer("hidden", router.k * spec.hidden), build.buffer("choices", router.k * inner)
    build.linear([body.router.score], read, Add(logits))
    build.add(Kind.ROUTE, **{"in": logits}, out=routes, inputs=spec.count, choices=router.k, normalise=router.normalise)
    if body.shared is not None:
        shared = build.buffer("shared", inner)
        lower(build, body.shared, read, Add(shared, add.residual))
        add = Add(add.buffer, shared)
    routed: Fields = {"experts": spec.count, "choices": router.k, "routes": routes}
    pairs = [each for both in zip(body.gate, body.up, strict=True) for each in both]
    build.product(pairs, read, Add(hidden), 2 * spec.hidden, act=act(spec.act), gated=True, **routed)
    build.product(list(body.down), Read(hidden), Add(made), inner, weighted=True, **routed)
    build.add(Kind.ADD, **{"in": made}, out=add.buffer, residual=add.residual, inputs=inner, choices=router.k)


@lowers(Mamba)
def mamba(build: Builder, body: Any, read: Read, add: Add) -> None:
    spec, inner = body.spec, len(body.x.weight)
    reach(build.mask)  # documents in one row have no kernel
    both, x, steps = build.buffer("x and z", 2 * inner), build.buffer("x", inner), build.buffer("steps", inner)
    low, keys = build.buffer("low rank", len(body.dt_down.weight)), build.buffer("B and C", 2 * spec.state)
    mixed = build.buffer("mixed", inner)
    build.linear([body.x, body.z], read, Add(both))
    convolve(build, [body.x_conv], both, 0, Add(x))
    build.linear([body.dt_down], Read(x), Add(low))
    normed(build, body.dt_norm, low)
    step_sizes(build, body.dt_up, body.dt_bias, Read(low), steps)
    build.linear([body.B, body.C], Read(x), Add(keys))
    normed(build, body.B_norm, keys)
    normed(build, body.C_norm, keys, spec.state)
    build.add(Kind.SCAN, **{"in": x}, out=mixed, steps=steps, keys=keys, gate=both, gate_at=inner, inputs=inner,
              states=spec.state, decay=build.floats(-body.A_log.float().exp().t()), skip=build.floats(body.D),
              state_at=build.state(inner * spec.state))  # fmt: skip
    build.linear([body.out], Read(mixed), add)


@lowers(Mamba2)
def mamba2(build: Builder, body: Any, read: Read, add: Add) -> None:
    spec, inner, shared = body.spec, len(body.x.weight), len(body.B.weight)
    reach(build.mask)
    if spec.step_limit not in (None, (0.0, math.inf)):
        raise Unlowered(f"steps within {spec.step_limit}")
    every, x, steps = (
        build.buffer(name, width) for name, width in
        (("x, B, C and z", 2 * inner + 2 * shared), ("x, B and C", inner + 2 * shared), ("steps", spec.heads))
    )  # fmt: skip
    mixed, gate = build.buffer("mixed", inner), inner + 2 * shared
    build.linear([body.x, body.B, body.C, body.z], read, Add(every))
    step_sizes(build, body.dt, body.dt_bias, read, steps)
    convolve(build, list(body.convolutions), every, 0, Add(x))
    build.add(Kind.RECALL, **{"in": x}, out=mixed, steps=steps, gate=every, gate_at=gate, heads=spec.heads,
              groups=spec.groups, head_width=body.head_width, states=spec.state,
              decay=build.floats(-body.A_log.float().exp()), skip=build.floats(body.D), act=ACTS.index("silu"),
              state_at=build.state(inner * spec.state))  # fmt: skip
    part = inner // spec.groups
    for n in range(spec.groups):  # each group is normalised by itself
        weight = build.floats(body.norm.weight[n * part :][:part])
        build.add(Kind.NORM, **{"in": mixed}, in_at=n * part, out=mixed, out_at=n * part, inputs=part,
                  norm=NormKind.RMS, eps=spec.eps, norm_weight=weight)  # fmt: skip
    build.linear([body.out], Read(mixed), add)


def normed(build: Builder, norm: Any, buffer: int, at: int = 0) -> None:
    """A part of a buffer normalised in place, if there is a norm."""
    if norm is not None:
        place: Fields = {"in": buffer, "in_at": at, "out": buffer, "out_at": at}
        build.add(Kind.NORM, **place, inputs=len(norm.weight), **norm_fields(build, norm))


def convolve(build: Builder, layers: Sequence[Any], source: int, at: int, add: Add, act: str = "silu") -> None:
    """act of convolutions side by side, from and to the same place in a row."""
    weight = torch.cat([layer.weight.detach().float() for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    width, taps = weight.shape
    build.add(Kind.CONVOLVE, **{"in": source}, in_at=at, out=add.buffer, out_at=at, inputs=width, taps=taps,
              weight=build.floats(weight.t()), act=ACTS.index(act), state_at=build.state(width * (taps - 1)),
              **({"bias": build.floats(torch.cat(biases))} if biases else {}))  # fmt: skip


def step_sizes(build: Builder, layer: Linear, bias: Tensor, read: Read, steps: int) -> None:
    """softplus(W x + b), b added to the layer's own."""
    if layer.adapters:
        raise Unlowered("an adapter: merge it first")
    whole = bias.detach().float() if layer.bias is None else bias.detach().float() + layer.bias.detach().float()
    build.product([layer.weight], read, Add(steps), len(whole), whole, "softplus")


def key_norms(build: Builder, body: Any) -> Fields:
    if body.q_norm is None:
        return {}
    q, k = norm_fields(build, body.q_norm), norm_fields(build, body.k_norm)
    made = {"norm": q["norm"], "eps": q["eps"], "key_eps": k["eps"]}
    made |= {"query_weight": q["norm_weight"], "key_weight": k["norm_weight"]}
    return {**made, "query_bias": q["norm_bias"], "key_bias": k["norm_bias"]} if "norm_bias" in q else made


def reach(mask: Mask) -> Fields:
    """How many tokens behind and ahead of a query it sees."""
    match mask:
        case Full():
            return {"behind": FAR, "ahead": FAR}
        case Causal():
            return {"behind": FAR, "ahead": 0}
        case Window():
            return {"behind": mask.size - 1, "ahead": mask.size - 1}
        case All():
            each = [reach(one) for one in mask.masks]
            return {side: min(one[side] for one in each) for side in ("behind", "ahead")}
    raise Unlowered(f"the mask {mask}")


def place(position: Positional | None) -> Positional | None:
    """The position itself, where layers share one."""
    return position.target[0] if isinstance(position, SharedPosition) else position


def turns(build: Builder, position: Any) -> Fields:
    """How queries and keys are rotated."""
    position = place(position)
    spec: Any = None if position is None else position.spec
    if spec is None or isinstance(spec, ALiBi | Relative):
        return {}
    fixed = LinearScaling | BandScaling | EndpointScaling | YaRN | None
    if not isinstance(spec, Rotary) or not isinstance(spec.scaling, fixed):
        raise Unlowered(f"the position {spec}")

    def wave(which: int) -> Callable[[int], Tensor]:
        def table(rows: int) -> Tensor:
            positions = torch.arange(rows)[None]
            values = position.table(positions, Context(positions))[which][0, 0]
            return values[:, position.turned // 2 :].float().contiguous()

        return table

    cos, sin = (build.table((which, position.look(), position.turned), wave(which)) for which in range(2))
    return {"turned": position.turned, "cos": cos, "sin": sin}


def distances(build: Builder, position: Any, heads: int) -> Fields:
    """What is added to the scores, by distance."""
    position = place(position)
    if position is None or not isinstance(position.spec, ALiBi | Relative):
        return {}

    def table(rows: int) -> Tensor:
        queries, keys = torch.full((1, 1, 1), rows), torch.arange(2 * rows + 64)[None, None]
        with torch.no_grad():
            return position.bias(queries, keys, Context(keys[0]))[0, :, 0].float().contiguous()

    return {"distance": build.table(("distance", position.look(), heads), table)}
