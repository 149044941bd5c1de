"""Rotary positions in GGUF files, both ways: keys and factors of the file against config.json's `rope_parameters`.

Each of the two says less than one thing at a time, so no table of keys leads from one to the other.
"""

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.parts import Rotary
from qkv.parts.position import BandScaling, LinearScaling, LongRope, Scaling, YaRN
from qkv.parts.position.scaling import spans
from qkv.zoo.config import Config
from qkv.zoo.gguf import Architecture


def with_rotary(
    architecture: Architecture, values: dict[str, Any], says: Config, factors: Mapping[str, list[float]], where: str
) -> dict[str, Any]:
    """The values with `rope_parameters`, which stand for several keys of the file."""
    c = Config(values, (), where)
    split = c.integer("hidden_size") // c.integer("num_attention_heads") or 1
    head = c.integer("head_dim", split)
    turned, theta = c.integer("rotary_width", head), c.number("rope_theta", 10000.0)
    part = turned / head
    shared = {"partial_rotary_factor": part if int(head * part) == turned else math.nextafter(part, 1)}
    longest = c.integer("max_position_embeddings", 2048)
    rope: dict[str, Any] = {"rope_theta": theta, **shared, **scaling(says, factors, longest, theta, turned)}
    if "rope_local_base_freq" in c:
        near = {"rope_type": "default", "rope_theta": c.number("rope_local_base_freq"), **shared}
        rope = {"full_attention": rope, "sliding_attention": near}
    if architecture.wide is not None:
        values["query_pre_attn_scalar"] = split if values.get("num_hidden_layers") == architecture.wide else head
    put = {"rotary_width", "rope_theta", "rope_local_base_freq", *(["head_dim"] if head == split else [])}
    return {**{key: value for key, value in values.items() if key not in put}, "rope_parameters": rope}


def scaling(s: Config, factors: Mapping[str, list[float]], longest: int, theta: float, turned: int) -> dict[str, Any]:
    """What `rope_parameters` says of the scaling, from the keys and the tensors of factors."""
    kind = s.text("rope.scaling.type", "linear" if "rope.scaling.factor" in s else "none")
    factor, trained = s.number("rope.scaling.factor", 0.0), s.optional("rope.scaling.original_context_length")
    louder = s.number("rope.scaling.attn_factor", 1.0)
    before = {"original_max_position_embeddings": trained} if trained else {}
    if "rope_factors_short.weight" in factors and "rope_factors_long.weight" in factors:
        short, long = factors["rope_factors_short.weight"], factors["rope_factors_long.weight"]
        usual = LongRope((), long=(), trained=trained or longest, factor=longest / (trained or longest)).magnitude
        said = {} if math.isclose(louder, usual, rel_tol=1e-6) else {"attention_factor": louder}
        return {"rope_type": "longrope", "short_factor": short, "long_factor": long, **before, **said}
    if kind == "yarn":
        fast, slow = s.number("rope.scaling.yarn_beta_fast", 32.0), s.number("rope.scaling.yarn_beta_slow", 1.0)
        said = {} if louder == 1 else {"attention_factor": louder * (1 + 0.1 * math.log(max(factor, 1.0)))}
        return {"rope_type": "yarn", "factor": factor, "beta_fast": fast, "beta_slow": slow, **before, **said}
    s.only("rope.scaling.type", "none", "linear")
    s.only("rope.scaling.attn_factor", 1.0)
    if "rope_freqs.weight" in factors:
        s.only("rope.scaling.factor", 0.0, 1.0)
        return divided(factors["rope_freqs.weight"], longest, theta, turned)
    return {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else {"rope_type": "default", **before}


def divided(factors: list[float], longest: int, theta: float, turned: int) -> dict[str, Any]:
    """Rates divided one by one: as every Llama 3 has them, or by numbers that are nobody's."""
    band = BandScaling(max(*factors, 1.0), low=1.0, high=4.0, trained=8192)
    if torch.tensor(factors).shape == (turned // 2,) and torch.allclose(
        divisors(band, theta, turned), torch.tensor(factors)
    ):
        return {
            "rope_type": "llama3", "factor": band.factor, "low_freq_factor": band.low, "high_freq_factor": band.high,
            "original_max_position_embeddings": band.trained,
        }  # fmt: skip
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        "original_max_position_embeddings": longest,
    }  # fmt: skip


def divisors(scaling: Scaling, theta: float, turned: int) -> Tensor:
    """By what a scaling divides the plain rates."""
    one = torch.ones(1, 1, 1)
    return 1 / (scaling.rates(theta, turned, one) * spans(theta, turned, one)).flatten()


@dc.dataclass(frozen=True)
class Turning:
    """A rotary position as a file says it: keys behind the architecture's name, and tensors of factors."""

    keys: dict[str, Any]
    factors: dict[str, Tensor]


def turning(position: Rotary, head: int) -> Turning:
    """The way back; `QkvError` for a scaling that a file cannot say."""
    scaling, turned = position.scaling, int(head * position.fraction)
    if scaling is None:
        return Turning({}, {})
    if isinstance(scaling, LinearScaling):
        return Turning({"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}, {})
    if isinstance(scaling, YaRN):
        louder = scaling.magnitude / (1 + 0.1 * math.log(max(scaling.factor, 1.0)))
        keys = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": scaling.factor,
            "rope.scaling.original_context_length": scaling.trained,
            "rope.scaling.yarn_beta_fast": scaling.fast,
            "rope.scaling.yarn_beta_slow": scaling.slow,
        }
        return Turning(keys if math.isclose(louder, 1) else {**keys, "rope.scaling.attn_factor": louder}, {})
    if isinstance(scaling, LongRope) and (scaling.short != scaling.long or scaling.magnitude != 1):
        keys = {
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": scaling.trained,
            "rope.scaling.attn_factor": scaling.magnitude,
        }
        named = {"short": scaling.short, "long": scaling.long}
        return Turning(keys, {f"rope_factors_{which}.weight": torch.tensor(row) for which, row in named.items()})
    if isinstance(scaling, BandScaling | LongRope):
        return Turning({}, {"rope_freqs.weight": divisors(scaling, position.theta, turned)})
    raise QkvError(f"GGUF has no form for rotary positions with {scaling.kind}")
