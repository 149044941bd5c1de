"""Bamba: layers of Mamba-2, with attention in a few of them (IBM 2024)."""

from typing import Any

from qkv.errors import QkvError
from qkv.models import Sequence
from qkv.parts import Gated, Mamba2, RMSNorm
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, sized
from qkv.zoo.jamba import BODY, block, hybrid
from qkv.zoo.mamba import step_limit
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import rotary

NAMES = """
    model.layers.{i}.mamba.in_proj                              stack.{i}.mixer.f.{z,x,B,C,dt}
    model.layers.{i}.mamba.conv1d.weight    stack.{i}.mixer.f.{x_conv.weight,B_conv.weight,C_conv.weight}  squeeze:1
    model.layers.{i}.mamba.conv1d.bias      stack.{i}.mixer.f.{x_conv.bias,B_conv.bias,C_conv.bias}
    model.layers.{i}.mamba.{A_log,D,dt_bias,norm}               stack.{i}.mixer.f.{A_log,D,dt_bias,norm}
    ~ *.rotary_emb.inv_freq
"""


@family("bamba", names=BODY + NAMES, prefix="model.")
def bamba(c: Config) -> Sequence:
    """Bamba; half of what each head of attention has is turned."""
    norm, heads = RMSNorm(c.number("rms_norm_eps", 1e-5)), c.integer("mamba_n_heads", 128)
    inner = c.integer("mamba_expand", 2) * c.integer("hidden_size")
    auto = c.values.get("mamba_d_head") in (None, "auto")
    mamba = Mamba2(
        heads,
        head_width=inner // heads if auto else c.integer("mamba_d_head"),
        groups=c.integer("mamba_n_groups", 1),
        state=c.integer("mamba_d_state", 256),
        conv=c.integer("mamba_d_conv", 4),
        conv_bias=c.flag("mamba_conv_bias", True),
        bias=c.flag("mamba_proj_bias", False),
        step_limit=step_limit(c),
        eps=norm.eps,
    )
    if heads * (mamba.head_width or 0) != inner:
        raise QkvError(
            f"{heads} heads of mamba_d_head {mamba.head_width} are not mamba_expand × hidden_size = {inner} wide"
        )
    position = rotary(c, fraction=0.5)
    c.only("attn_rotary_emb", int(position.fraction * (c.integer("hidden_size") // c.integer("num_attention_heads"))))
    looking = attention(c, bias=c.flag("attention_bias", False), position=position)
    ffn, depth = Gated(c.integer("intermediate_size")), c.depth("num_hidden_layers")
    layers = c.list("attn_layer_indices", int)
    if not set(layers) <= set(range(depth)):
        raise QkvError(f"{c.where}: attn_layer_indices is {layers}, and there are {depth} layers, from 0")
    c.only("hidden_act", "silu")
    c.only("mlp_bias", False)
    c.ignore("mamba_d_head", "mamba_chunk_size", "max_position_embeddings", "num_logits_to_keep", "z_loss_coefficient")
    c.ignore("use_mamba_kernels")
    return hybrid(c, norm, [block(norm, looking if n in layers else mamba, ffn) for n in range(depth)])


@preset("bamba-9b")
def bamba_9b() -> dict[str, Any]:
    """32 layers 4096 wide, attention in 3 of them, 9.8 B parameters (IBM 2024)."""
    return sized(
        "bamba", "Bamba", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5,
        attn_layer_indices=[9, 18, 27], mamba_n_heads=128, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=128,
        mamba_d_conv=4, mamba_expand=2, mamba_conv_bias=True, mamba_proj_bias=False, tie_word_embeddings=False,
        attention_dropout=0.0, partial_rotary_factor=0.5,
    )  # fmt: skip
