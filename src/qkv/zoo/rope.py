"""Rotary positions as configurations describe them: `rope_parameters`, or `rope_theta` and `rope_scaling` before it."""

from qkv.parts import Rotary
from qkv.parts.position import BandScaling, LinearScaling, LongRope, NTKScaling, Scaling, YaRN
from qkv.zoo.config import Config


def rotary(c: Config, *, layers: str | None = None, theta: float = 10000.0, fraction: float = 1.0) -> Rotary:
    """The rotary position of a model, or of its `layers` of one kind where each kind has a table of its own.

    `theta` and `fraction` are the family's own, where the configuration says nothing.
    """
    newer = "rope_parameters" in c
    table = c.table("rope_parameters" if newer else "rope_scaling")
    c.ignore("rope_parameters", "rope_scaling")
    if layers is not None and layers in table:
        table = table.table(layers)
    base = table.number("rope_theta", theta) if newer else c.number("rope_theta", theta)
    part = table.number("partial_rotary_factor", 0.0) or c.number("partial_rotary_factor", fraction)
    c.ignore("rope_theta", "partial_rotary_factor")
    return Rotary(base, fraction=part, scaling=scaling(c, table))


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
        made = YaRN(
            table.number("factor"),
            trained=trained,
            fast=table.number("beta_fast", 32.0),
            slow=table.number("beta_slow", 1.0),
            attention_factor=optional(table, "attention_factor"),
            numerator=optional(table, "mscale"),
            denominator=optional(table, "mscale_all_dim"),
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


def optional(c: Config, key: str) -> float | None:
    c.ignore(key)
    return c.number(key) if key in c else None
