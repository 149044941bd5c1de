"""Families by the name that their configurations use, and presets by their own.

A family is a function from a configuration to a spec, and a table of names. A preset is a function that returns a
published configuration, or a spec where its form has none, with what it is in its docstring's first line.
"""

import dataclasses as dc
import re
from collections.abc import Callable, Collection, Mapping
from reprlib import repr as shown
from typing import Any, TypeAlias

from qkv.errors import QkvError
from qkv.models import Model
from qkv.spec import nearest
from qkv.zoo.config import Config

Reader: TypeAlias = Callable[[Config], Model]
Preset: TypeAlias = Callable[[], Model | dict[str, Any]]
Names: TypeAlias = str | Callable[[Any], str]
LONGEST = 400
"""Of what a family says of a configuration's values, in characters."""


@dc.dataclass(frozen=True)
class Family:
    """Models of one published form."""

    kind: str
    """`model_type` in their config.json."""
    spec: Reader
    names: Names
    """The table of names (see `checkpoints/names.py`), or a function that makes it for a spec."""
    prefix: str = ""
    """What the names of a model without its head lack."""

    def tables(self, spec: Model) -> list[str]:
        """The tables that a file of this family may follow, the likeliest first."""
        names = self.names if isinstance(self.names, str) else self.names(spec)
        return [names, without_prefix(names, self.prefix)] if self.prefix else [names]


def without_prefix(table: str, prefix: str) -> str:
    """The table for a file whose names lack the prefix."""
    return re.sub(rf"(?m)^(\s*[=~+]?\s*){re.escape(prefix)}", r"\1", table)


FAMILIES: dict[str, Family] = {}
PRESETS: dict[str, Preset] = {}


def family(*kinds: str, names: Names, prefix: str = "") -> Callable[[Reader], Reader]:
    """Register a function from a configuration to a spec as the families of these kinds."""

    def register(spec: Reader) -> Reader:
        for kind in kinds:
            FAMILIES[kind] = Family(kind, spec, names, prefix)
        return spec

    return register


def family_of(values: Mapping[str, Any], where: str = "config.json") -> Family:
    """The family that a configuration names."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        raise QkvError(f"{where} has no model_type, which says what model it is")
    if kind not in FAMILIES:
        own = "; it brings code of its own (auto_map), which qkv never runs" if "auto_map" in values else ""
        raise QkvError(f"{where}: qkv does not know the model_type {shown(kind)}{own}{nearest(kind[:64], FAMILIES)}")
    return FAMILIES[kind]


def spec_from(values: Mapping[str, Any], keys: Collection[str] = (), where: str = "config.json") -> Model:
    """The spec that a configuration describes, every key of it accounted for; `keys` name the tensors beside it."""
    config = Config(values, keys, where)
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    config.only("quantization_config")
    config.only("pruned_heads", {})
    try:
        spec = family_of(values, where).spec(config)
    except QkvError as fault:
        said = str(fault) if str(fault).startswith(where) else f"{where}: {fault}"
        raise QkvError(said[: len(where) + LONGEST]) from None
    except ArithmeticError as fault:
        raise QkvError(f"{where}: its numbers make no model ({fault})") from None
    config.close()
    return spec


def preset(name: str) -> Callable[[Preset], Preset]:
    """Register a function without arguments as the preset of that name."""

    def register(function: Preset) -> Preset:
        PRESETS[name] = function
        return function

    return register


def spec_of(name: str) -> Model:
    """The spec of a preset; `QkvError` where there is none of that name."""
    if name not in PRESETS:
        raise QkvError(f"no preset is called {name!r}{nearest(name, PRESETS)}")
    made = PRESETS[name]()
    return made if isinstance(made, Model) else spec_from(made)
