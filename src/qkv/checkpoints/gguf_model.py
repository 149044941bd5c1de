"""Models from GGUF files and from llama2.c's: metadata becomes a config.json, and names follow a table of their own.

`qkv.zoo.gguf` says which key and which tensor means what; rotary positions, of which both a file and a config.json say
less than one thing at a time, are put together here.
"""

import dataclasses as dc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.checkpoints.gguf import GGUF
from qkv.checkpoints.llama2c import Llama2C
from qkv.checkpoints.load import load_published
from qkv.errors import QkvError
from qkv.models import Model, Module
from qkv.ops.blocks.packed import Packed
from qkv.parts import Rotary
from qkv.parts.position import BandScaling, LinearScaling, LongRope, Scaling, YaRN
from qkv.parts.position.scaling import spans
from qkv.zoo.config import Config
from qkv.zoo.gguf import ALWAYS_F32, ROPE_KEYS, Architecture, architecture_of, head_counts
from qkv.zoo.llama import NAMES as LLAMA_NAMES


def load_gguf(path: Path | str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> Module:
    """The model of a .gguf file, in evaluation mode, its weights dequantised to `dtype`.

    `packed` leaves the matrices in their blocks, mapped from the file, and computes in `dtype` (`ops.blocks.packed`).
    Every key of its architecture and every tensor is accounted for: else QkvError, which says what is not.
    """
    return load_published(GGUFModel(path, dtype, packed=packed), dtype)


def load_llama2c(path: Path | str, dtype: torch.dtype = torch.float32) -> Module:
    """The model of llama2.c's file of version 0, in evaluation mode."""
    return load_published(Llama2CModel(path), dtype)


class GGUFModel:
    """A .gguf file as a source of a model: tensors dequantised one by one as they are asked for, or packed."""

    def __init__(self, path: Path | str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> None:
        self.file, self.dtype, self.packed = GGUF(path), dtype, packed
        self.path = self.file.path
        self.architecture, says = described(self.file)
        shapes = {name: entry.shape for name, entry in self.file.tensors.items()}
        factors = {
            name: shortest(self.file.tensor(name).flatten().tolist()) for name in shapes if name.startswith("rope_f")
        }
        try:
            self.config = configuration(self.architecture, says, shapes, factors, str(self.path))
        except QkvError as fault:
            raise fault if str(fault).startswith(str(self.path)) else QkvError(f"{self.path}: {fault}") from None

    @property
    def keys(self) -> list[str]:
        return list(self.file.tensors)

    def tables(self, spec: Model) -> list[str]:
        """Its tables of names, which are not those of the family's own files."""
        return self.architecture.tables(spec)

    def tensor(self, key: str) -> Tensor:
        entry = self.file.tensors.get(key)
        if not self.packed or entry is None or len(entry.shape) < 2 or entry.type == "F32" or key.endswith(ALWAYS_F32):
            return self.file.tensor(key, self.dtype)
        return Packed(entry.type, self.file.data(key).view(*entry.shape[:-1], -1), self.dtype)


class Llama2CModel(Llama2C):
    """llama2.c's file as a source of a model."""

    dtype = torch.float32

    @property
    def keys(self) -> list[str]:
        return list(self.tensors)

    def tables(self, spec: Model) -> list[str]:
        """The family's names; the two members of a rotary pair are neighbours."""
        heads, groups = head_counts(spec)
        return [LLAMA2C.format(heads=heads, groups=groups) + LLAMA_NAMES]


LLAMA2C = """
    model.layers.{{i}}.self_attn.q_proj     stack.{{i}}.attn.f.q    rope:{heads}
    model.layers.{{i}}.self_attn.k_proj     stack.{{i}}.attn.f.k    rope:{groups}
"""


# --- the metadata ---


def described(file: GGUF) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a file, and what the keys behind its name say."""
    name, parts = file.metadata.get("general.architecture"), file.metadata.get("split.count", 1)
    if not isinstance(name, str):
        raise QkvError(f"{file.path} has no general.architecture, which says what model it is")
    if parts not in (0, 1):
        raise QkvError(f"{file.path} is one of {parts} parts of a model: join them with llama-gguf-split --merge")
    says = {key[len(name) + 1 :]: value for key, value in file.metadata.items() if key.startswith(f"{name}.")}
    return architecture_of(name, frozenset(says), str(file.path)), shortest(says)


def shortest(value: Any) -> Any:
    """Numbers of 32 bits as they were meant: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, dict):
        return {key: shortest(one) for key, one in value.items()}
    if isinstance(value, list):
        return [shortest(one) for one in value]
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def configuration(
    architecture: Architecture,
    says: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
    factors: Mapping[str, list[float]],
    where: str,
) -> dict[str, Any]:
    """The config.json of a file, `factors` being its tensors of rotary factors; an unknown key raises `QkvError`."""
    keys, name = architecture.keys, architecture.name
    turns = any(row == "rope.dimension_count" for row, _ in keys.rows)
    known = {key for key, _ in keys.rows} | set(keys.fixed) | set(keys.inert) | set(ROPE_KEYS.split() if turns else ())
    left = sorted(set(says) - known)
    if left:
        raise QkvError(
            f"{where} has keys that qkv does not know of this architecture: {name}.{f', {name}.'.join(left[:6])}; "
            "ignoring them could run another model than the one that was published"
        )
    values: dict[str, Any] = {
        "model_type": architecture.kind,
        "architectures": [architecture.model],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{key: tensor in shapes for key, tensor in keys.present.items()},
        **{key: shapes[tensor][0] for key, tensor in keys.counted.items() if len(shapes.get(tensor, ())) == 2},
    }
    for key, at in keys.rows:
        if at == "sliding_window" and says.get(key) == 0:
            continue  # so Phi-4 says that it has none
        if key in says and values.setdefault(at, says[key]) != says[key]:
            raise QkvError(
                f"{where}: {name}.{key} is {says[key]!r}, where {at} is {values[at]!r} by the rest of the file"
            )
    for key, value in keys.fixed.items():
        if says.get(key, value) != value:
            raise QkvError(f"{where}: {name}.{key} is {says[key]!r}, for which qkv has no part; it runs {value!r}")
    values = {**keys.usual, **values}
    depth = says.get("block_count")
    if type(depth) is int and depth > len(shapes):
        raise QkvError(f"{where}: {name}.block_count is {depth}, and the file has {len(shapes)} tensors")
    return with_rotary(architecture, values, Config(says, (), f"{where}: {name}"), factors, where) if turns else values


# --- rotary positions, both ways ---


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
