"""DeltaNet and Gated DeltaNet: memories that replace what a key held before (Schlag 2021, Yang 2024)."""

from typing import Any

from qkv.errors import QkvError
from qkv.models import Sequence
from qkv.parts import Decay, Delta, Memory, RMSNorm, StepSize, Unit
from qkv.zoo.config import Config
from qkv.zoo.linear import NAMES, decoder, share, sized
from qkv.zoo.registry import family, preset

DELTA = """
    model.layers.{i}.attn.b_proj                stack.{i}.attn.f.rule.rate.up
    model.layers.{i}.attn.o_norm                stack.{i}.attn.f.norm
"""
STEPS = """
    model.layers.{i}.attn.a_proj                stack.{i}.attn.f.decay.step.up
    model.layers.{i}.attn.dt_bias               stack.{i}.attn.f.decay.step.bias
    model.layers.{i}.attn.A_log                 stack.{i}.attn.f.decay.A_log
"""


@family("delta_net", names=NAMES + DELTA, prefix="model.")
def delta_net(c: Config) -> Sequence:
    """DeltaNet."""
    heads = c.integer("num_heads", 16)
    c.only("qk_norm", "l2")
    c.only("qk_activation", "silu")
    c.only("use_beta", True)
    c.ignore("use_output_norm")  # there is one whatever it says
    keys, values = share(c, "expand_k", 1.0, heads), share(c, "expand_v", 1.0, heads)
    return decoder(c, memory(c, heads, None, keys, values, None, "silu" if c.flag("use_gate", False) else None))


@family("gated_deltanet", names=NAMES + DELTA + STEPS, prefix="model.")
def gated_deltanet(c: Config) -> Sequence:
    """Gated DeltaNet."""
    groups, keys = c.integer("num_heads", 6), c.integer("head_dim", 256)
    heads, values = c.optional("num_v_heads") or groups, c.number("expand_v", 2.0) * keys
    if values < 1 or values % 1:
        raise QkvError(f"{c.where}: expand_v × head_dim is {values:g}, no whole number")
    act = c.act("output_gate_activation", "swish") if c.flag("use_gate", True) else None
    c.ignore("output_gate_activation")
    return decoder(c, memory(c, heads, groups if groups != heads else None, keys, int(values), StepSize(), act))


def memory(
    c: Config, heads: int, groups: int | None, keys: int, values: int, decay: Decay | None, gate: str | None
) -> Memory:
    """With `allow_neg_eigval` β reaches 2."""
    c.only("use_short_conv", True)
    c.ignore("fuse_norm")
    rule = Delta(2.0 if c.flag("allow_neg_eigval", False) else 1.0)
    norm, conv = RMSNorm(c.number("norm_eps", 1e-6)), c.integer("conv_size", 4)
    return Memory(
        heads, groups=groups, key_width=keys, value_width=values, decay=decay, rule=rule, feature=Unit(), conv=conv,
        norm=norm, gate=gate,
    )  # fmt: skip


@preset("delta-net-1.3b")
def delta_net_1b() -> dict[str, Any]:
    """24 layers 2048 wide, 1.4 B parameters (Yang 2024)."""
    return sized("delta_net", "DeltaNet", 2048, 5632, 24, 16, expand_k=1.0, expand_v=1.0, conv_size=4, use_gate=False)


@preset("gated-delta-net-1.3b")
def gated_deltanet_1b() -> dict[str, Any]:
    """21 layers 2048 wide, 1.4 B parameters (Yang 2024)."""
    return sized(
        "gated_deltanet", "GatedDeltaNet", 2048, 5632, 21, 6, head_dim=256, expand_v=2.0, conv_size=4, use_gate=True
    )
