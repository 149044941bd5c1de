"""GLA: gated linear attention, whose memory forgets channel by channel as the token says (Yang 2023)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Memory, PerChannel, Pointwise
from qkv.zoo.config import Config
from qkv.zoo.linear import decoder, share, sized
from qkv.zoo.registry import family, preset
from qkv.zoo.retnet import gate, normed, norms

GATES = """
    model.layers.{i}.attn.gk_proj.0             stack.{i}.attn.f.decay.gate.down
    model.layers.{i}.attn.gk_proj.1.weight      stack.{i}.attn.f.decay.gate.up.weight
    model.layers.{i}.attn.gk_proj.1.bias        stack.{i}.attn.f.decay.gate.bias
"""


def names(spec: Sequence) -> str:
    return norms(spec) + GATES


@family("gla", names=names, prefix="model.")
def gla(c: Config) -> Sequence:
    """GLA; with `use_short_conv` queries, keys and values are each convolved, and then silu."""
    heads, short = c.integer("num_heads", 4), c.flag("use_short_conv", False)
    c.only("num_kv_heads", heads)
    c.only("feature_map")
    c.only("clamp_min")
    c.only("use_gk", True)
    c.only("use_gv", False)
    c.ignore("conv_size", "share_conv_kernel")
    f = Memory(
        heads,
        key_width=share(c, "expand_k", 0.5, heads),
        value_width=share(c, "expand_v", 1.0, heads),
        decay=PerChannel(),
        feature=Pointwise("silu") if short else None,
        conv=c.integer("conv_size", 4) if short else None,
        norm=normed(c),
        gate=gate(c, "use_output_gate"),
    )
    return decoder(c, f)


@preset("gla-1.3b")
def gla_1b() -> dict[str, Any]:
    """24 layers 2048 wide, 1.4 B parameters (Yang 2023)."""
    return sized("gla", "GLA", 2048, 5632, 24, 4, expand_k=0.5, expand_v=1.0, hidden_ratio=4)
