"""RetNet: retention where a decoder has attention, its values twice as wide as its keys (Sun 2023)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Memory, PerHead, Pointwise, RMSNorm, Rotary
from qkv.zoo.config import Config
from qkv.zoo.linear import NAMES, decoder, share, sized
from qkv.zoo.registry import family, preset

GATED = "model.layers.{i}.attn.g_norm_swish_gate stack.{i}.attn.f.norm"
PLAIN = "model.layers.{i}.attn.g_norm stack.{i}.attn.f.norm"


def norms(spec: Sequence) -> str:
    """A norm is called by whether a gate follows it."""
    f = spec.stack.blocks[0].branches["attn"].f
    return f"{NAMES}\n{PLAIN if getattr(f, 'gate', None) is None else GATED}\n~ *.rotary.inv_freq\n"


@family("retnet", names=norms, prefix="model.")
def retnet(c: Config) -> Sequence:
    """RetNet; its angles are those of a rotary position, not the paper's, which end at 1/θ."""
    heads = c.integer("num_heads", 8)
    c.only("num_kv_heads", heads)
    c.only("use_short_conv", False)
    c.ignore("conv_size")
    f = Memory(
        heads,
        key_width=share(c, "expand_k", 1.0, heads),
        value_width=share(c, "expand_v", 2.0, heads),
        decay=PerHead(),
        feature=Pointwise(c.act("feature_map")) if "feature_map" in c else None,
        position=Rotary(),
        norm=normed(c),
        gate=gate(c, "use_output_gate"),
    )
    c.ignore("feature_map")
    return decoder(c, f)


def normed(c: Config) -> RMSNorm:
    """The norm of what is read; one that is not fused with its gate has another name in the file."""
    c.only("elementwise_affine", True)
    c.only("fuse_norm", True)
    return RMSNorm(c.number("norm_eps", 1e-6))


def gate(c: Config, key: str, default: bool = True) -> str | None:
    return "silu" if c.flag(key, default) else None


@preset("retnet-1.3b")
def retnet_1b() -> dict[str, Any]:
    """24 layers 2048 wide, 1.35 B parameters (Sun 2023)."""
    return sized("retnet", "RetNet", 2048, 2816, 24, 8, expand_k=1.0, expand_v=2.0, hidden_ratio=2)
