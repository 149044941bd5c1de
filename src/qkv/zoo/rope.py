"""Rotary positions as configurations describe them: `rope_parameters`, or `rope_theta` and `rope_scaling` before it."""

from qkv.errors import QkvError
from qkv.parts import Rotary
from qkv.parts.position import BandScaling, LinearScaling, LongRope, NTKScaling, Scaling, YaRN
from qkv.zoo.config import Config


def rotary(
    c: Config,
    *,
    layers: str | None = None,
    key: str = "rope_theta",
    theta: float = 10000.0,
    fraction: float | None = None,
) -> Rotary:
    """The rotary position of a model, or of its `layers` of one kind where each kind has a table of its own.

    What the table does not say stands beside it, the base as `key`, or else is the family's own `theta` and `fraction`.
    A family without a fraction turns whole heads.
    """
    newer = "rope_parameters" in c
    if newer and c.table("rope_scaling").values not in ({}, c.values["rope_parameters"]):
        raise QkvError(f"{c.where} has rope_parameters and rope_scaling: move what rope_scaling says into the other")
    table = c.table("rope_parameters" if newer else "rope_scaling")
    c.ignore("rope_parameters", "rope_scaling", "rope_theta")
    if layers is not None and layers in table:
        table = table.table(layers)
    base = table.number("rope_theta", c.number(key, theta))
    if fraction is None:
        table.only("partial_rotary_factor", 1.0)
        c.only("partial_rotary_factor", 1.0)
        fraction = 1.0
    else:
        fraction = table.number("partial_rotary_factor", c.number("partial_rotary_factor", fraction))
    return Rotary(base, fraction=fraction, scaling=scaling(c, table))


def scaling(c: Config, table: Config) -> Scaling | None:
    """What `rope_type` (formerly `type`) of the table says, of which "longrope" was "su" before.

    The length that a model was trained on may stand outside the table; where it is not given at all, and for "dynamic"
    always, it is the longest text that the model takes.
    """
    kind = table.text("rope_type", table.text("type", "default"))
    longest = c.integer("max_position_embeddings", 2048)
    trained = table.integer("original_max_position_embeddings", c.integer("original_max_position_embeddings", longest))
    made: Scaling | None = None
    if kind == "linear":
        made = LinearScaling(table.number("factor"))
    elif kind == "dynamic":
        made = NTKScaling(table.number("factor"), trained=longest)
    elif kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        made = BandScaling(table.number("factor"), low=low, high=high, trained=trained)
    elif kind == "yarn":
        table.ignore("finetuned")
        made = YaRN(
            table.number("factor", longest / trained),
            trained=trained,
            fast=table.number("beta_fast", 32.0),
            slow=table.number("beta_slow", 1.0),
            attention_factor=optional(table, "attention_factor"),
            numerator=optional(table, "mscale") or None,  # 0 is as good as none
            denominator=optional(table, "mscale_all_dim") or None,
            truncate=table.flag("truncate", True),
        )
    elif kind in ("longrope", "su"):
        made = LongRope(
            tuple(table.list("short_factor", float)),
            long=tuple(table.list("long_factor", float)),
            trained=trained,
            factor=table.number("factor", longest / trained),
            attention_factor=optional(table, "attention_factor"),
        )
    else:
        table.only("rope_type", "default")
        table.only("type", "default")
    table.close()
    return made


def optional(c: Config, key: str, unsaid: float | None = None) -> float | None:
    """A number; None where the key is null, `unsaid` where there is none."""
    c.ignore(key)
    if key not in c.values:
        return unsaid
    return c.number(key) if key in c else None
