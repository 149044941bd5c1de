"""Mamba and Mamba-2: selective state spaces where a decoder has attention (Gu & Dao 2023, Dao & Gu 2024)."""

import math
from typing import Any

from qkv.errors import QkvError
from qkv.models import Sequence
from qkv.parts import Block, Branch, Head, Mamba, Mamba2, Mixer, RMSNorm, Stack, Tokens
from qkv.zoo.config import Config
from qkv.zoo.registry import family, preset

BODY = """
    backbone.embeddings                         embed.tokens
    backbone.embedding                          embed.tokens                    # in the first files
    backbone.layers.{i}.norm                    stack.{i}.mixer.pre
    backbone.layers.{i}.mixer.{A_log,D}         stack.{i}.mixer.f.{A_log,D}
    backbone.layers.{i}.mixer.out_proj          stack.{i}.mixer.f.out
    backbone.norm_f                             norm
    lm_head                                     head
    = lm_head                                   embed.tokens
"""

MAMBA = """
    backbone.layers.{i}.mixer.in_proj           stack.{i}.mixer.f.{x,z}
    backbone.layers.{i}.mixer.conv1d.weight     stack.{i}.mixer.f.x_conv.weight                                squeeze:1
    backbone.layers.{i}.mixer.conv1d.bias       stack.{i}.mixer.f.x_conv.bias
    backbone.layers.{i}.mixer.x_proj            stack.{i}.mixer.f.{dt_down,B,C}
    backbone.layers.{i}.mixer.dt_proj.weight    stack.{i}.mixer.f.dt_up.weight
    backbone.layers.{i}.mixer.dt_proj.bias      stack.{i}.mixer.f.dt_bias
"""

MAMBA2 = """
    backbone.layers.{i}.mixer.in_proj           stack.{i}.mixer.f.{z,x,B,C,dt}
    backbone.layers.{i}.mixer.conv1d.weight     stack.{i}.mixer.f.{x_conv.weight,B_conv.weight,C_conv.weight}  squeeze:1
    backbone.layers.{i}.mixer.conv1d.bias       stack.{i}.mixer.f.{x_conv.bias,B_conv.bias,C_conv.bias}
    backbone.layers.{i}.mixer.{dt_bias,norm}    stack.{i}.mixer.f.{dt_bias,norm}
"""


@family("mamba", names=BODY + MAMBA, prefix="backbone.")
def mamba(c: Config) -> Sequence:
    """Mamba."""
    width, rank = c.integer("hidden_size"), c.values.get("time_step_rank", "auto")
    f = Mamba(
        inner=c.integer("intermediate_size", c.integer("expand", 2) * width),
        state=c.integer("state_size", 16),
        rank=math.ceil(width / 16) if rank == "auto" else c.integer("time_step_rank"),
        conv=c.integer("conv_kernel", 4),
        conv_bias=c.flag("use_conv_bias", True),
        bias=c.flag("use_bias", False),
    )
    c.ignore("expand", "time_step_rank", "d_inner")
    return decoder(c, f, tied=True)


@family("mamba2", names=BODY + MAMBA2, prefix="backbone.")
def mamba2(c: Config) -> Sequence:
    """Mamba-2."""
    heads, inner = c.integer("num_heads"), c.integer("expand", 2) * c.integer("hidden_size")
    f = Mamba2(
        heads,
        head_width=c.integer("head_dim", 64),
        groups=c.integer("n_groups", 8),
        state=c.integer("state_size", 128),
        conv=c.integer("conv_kernel", 4),
        conv_bias=c.flag("use_conv_bias", True),
        bias=c.flag("use_bias", False),
        step_limit=step_limit(c),
        eps=c.number("layer_norm_epsilon", 1e-5),
    )
    if heads * (f.head_width or 0) != inner:
        raise QkvError(f"{heads} heads of head_dim {f.head_width} are not expand × hidden_size = {inner} wide")
    c.only("intermediate_size", inner)
    c.ignore("time_step_rank", "chunk_size", "norm_before_gate")
    return decoder(c, f, tied=False)


def step_limit(c: Config) -> tuple[float, float] | None:
    """JSON knows no infinity: the package writes {"__float__": "Infinity"}, and once wrote Infinity all the same."""
    said = [math.inf if x == {"__float__": "Infinity"} else x for x in c.value("time_step_limit", [], list)]
    if said in ([], [0, math.inf]):
        return None
    if len(said) != 2 or not all(type(x) in (int, float) for x in said):
        raise QkvError(f"time_step_limit is {said}; the least and the most step are expected")
    return float(said[0]), float(said[1])


def decoder(c: Config, f: Mixer, tied: bool) -> Sequence:
    """Blocks of one branch. How a model begins to learn, in which precision and by which kernel, is left out."""
    c.ignore("residual_in_fp32", "rescale_prenorm_residual", "use_mambapy", "use_associative_scan", "fused_add_norm")
    c.ignore("time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme")
    c.ignore("d_model", "n_layer", "ssm_cfg", "pad_vocab_size_multiple")
    c.only("hidden_act", "silu")
    c.only("rms_norm", True)
    if c.task not in ("CausalLM", ""):
        raise QkvError(f"qkv knows no {c.values['model_type']} model for {c.task}")
    norm = RMSNorm(c.number("layer_norm_epsilon", 1e-5))
    shared = c.tied("lm_head.weight", tied)
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size")),
        stack=Stack(Block(mixer=Branch(f, pre=norm)), depth=c.depth("num_hidden_layers")),
        norm=norm,
        head=Head(tied=shared) if c.task else None,
    )


@preset("mamba-130m")
def mamba_130m() -> dict[str, Any]:
    """24 layers 768 wide, 129 M parameters (Gu & Dao 2023)."""
    return {
        "model_type": "mamba", "architectures": ["MambaForCausalLM"], "vocab_size": 50280, "hidden_size": 768,
        "intermediate_size": 1536, "state_size": 16, "num_hidden_layers": 24, "expand": 2, "conv_kernel": 4,
        "time_step_rank": 48, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip


@preset("mamba2-130m")
def mamba2_130m() -> dict[str, Any]:
    """24 layers 768 wide, 129 M parameters (Dao & Gu 2024)."""
    return {
        "model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "vocab_size": 50288, "hidden_size": 768,
        "num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128, "num_hidden_layers": 24, "expand": 2,
        "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "hidden_act": "silu", "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
