"""Jamba: layers of Mamba, attention in one of eight, and experts in every other feed-forward (Lieber 2024)."""

import math
from typing import Any

from qkv.masks import Causal
from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, Experts, Gated, Mamba, Mixer, RMSNorm, Stack, Tokens, TopK
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.decoder import head, sized
from qkv.zoo.registry import family, preset

BODY = """
    model.embed_tokens                                          embed.tokens
    model.layers.{i}.input_layernorm                            stack.{i}.attn.pre
    model.layers.{i}.input_layernorm                            stack.{i}.mixer.pre
    model.layers.{i}.self_attn.{q,k,v,o}_proj                   stack.{i}.attn.f.{q,k,v,o}
    model.layers.{i}.mamba.out_proj                             stack.{i}.mixer.f.out
    model.layers.{i}.pre_ff_layernorm                           stack.{i}.ffn.pre
    model.layers.{i}.feed_forward.{gate,up,down}_proj.weight    stack.{i}.ffn.f.{gate,up,down}.weight
    model.final_layernorm                                       norm
    lm_head                                                     head
    = lm_head.weight                                            embed.tokens.weight
    score                                                       head.out
"""

NAMES = """
    model.layers.{i}.mamba.in_proj                              stack.{i}.mixer.f.{x,z}
    model.layers.{i}.mamba.conv1d.weight                        stack.{i}.mixer.f.x_conv.weight     squeeze:1
    model.layers.{i}.mamba.conv1d.bias                          stack.{i}.mixer.f.x_conv.bias
    model.layers.{i}.mamba.x_proj                               stack.{i}.mixer.f.{dt_down,B,C}
    model.layers.{i}.mamba.{dt,b,c}_layernorm                   stack.{i}.mixer.f.{dt_norm,B_norm,C_norm}
    model.layers.{i}.mamba.dt_proj.weight                       stack.{i}.mixer.f.dt_up.weight
    model.layers.{i}.mamba.dt_proj.bias                         stack.{i}.mixer.f.dt_bias
    model.layers.{i}.mamba.{A_log,D}                            stack.{i}.mixer.f.{A_log,D}
    model.layers.{i}.feed_forward.router                        stack.{i}.ffn.f.router.score
    model.layers.{i}.feed_forward.experts.{e}.{gate,up,down}_proj.weight    stack.{i}.ffn.f.{gate,up,down}
"""


@family("jamba", names=BODY + NAMES, prefix="model.")
def jamba(c: Config) -> Sequence:
    """Jamba; its attention knows no positions, and its Mamba norms what decides the steps."""
    width, norm = c.integer("hidden_size"), RMSNorm(c.number("rms_norm_eps", 1e-6))
    auto = c.values.get("mamba_dt_rank") in (None, "auto")
    mamba = Mamba(
        inner=c.integer("mamba_expand", 2) * width,
        state=c.integer("mamba_d_state", 16),
        rank=math.ceil(width / 16) if auto else c.integer("mamba_dt_rank"),
        conv=c.integer("mamba_d_conv", 4),
        conv_bias=c.flag("mamba_conv_bias", True),
        bias=c.flag("mamba_proj_bias", False),
        norm=norm,
    )
    attention = Attention(
        c.integer("num_attention_heads"),
        kv_heads=c.optional("num_key_value_heads"),
        head_width=c.optional("head_dim"),
        dropout=c.number("attention_dropout", 0.0),
    )
    c.only("hidden_act", "silu")
    c.ignore("mamba_dt_rank", "max_position_embeddings", "output_router_logits", "router_aux_loss_coef")
    c.ignore("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep")
    c.only("mamba_inner_layernorms", True)
    hidden, count = c.integer("intermediate_size"), c.integer("num_experts", 16)
    router = TopK(c.integer("num_experts_per_tok", 2), normalise=False)
    experts = Experts(hidden, count=count, router=router) if count > 1 else Gated(hidden)
    depth = c.depth("num_hidden_layers")
    looks, routes = every(c, "attn_layer", depth, (8, 4)), every(c, "expert_layer", depth, (2, 1))
    blocks = [
        block(norm, attention if look else mamba, experts if route else Gated(hidden))
        for look, route in zip(looks, routes, strict=True)
    ]
    return hybrid(c, norm, blocks)


def every(c: Config, name: str, depth: int, default: tuple[int, int]) -> list[bool]:
    """Which layers are those that come once a period."""
    period = c.integer(f"{name}_period", default[0])
    offset = c.integer(f"{name}_offset", default[1], least=0, most=period - 1)
    return [n % period == offset for n in range(depth)]


def block(norm: RMSNorm, f: Mixer, ffn: Mixer) -> Block:
    """A block whose first branch is called by what stands in it."""
    name = "attn" if isinstance(f, Attention) else "mixer"
    return Block(**{name: Branch(f, pre=norm), "ffn": Branch(ffn, pre=norm)})


def hybrid(c: Config, norm: RMSNorm, blocks: list[Block]) -> Sequence:
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size")),
        stack=Stack(rolled(blocks), depth=len(blocks)),
        mask=Causal(),
        norm=norm,
        head=head(c),
    )


@preset("jamba-v0.1")
def jamba_first() -> dict[str, Any]:
    """32 layers 4096 wide, 2 of 16 experts in every other one, 52 B parameters (Lieber 2024)."""
    return sized(
        "jamba", "Jamba", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=65536, rms_norm_eps=1e-6,
        attn_layer_period=8, attn_layer_offset=4, expert_layer_period=2, expert_layer_offset=1, num_experts=16,
        num_experts_per_tok=2, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=256,
        mamba_conv_bias=True, mamba_proj_bias=False, tie_word_embeddings=False, attention_dropout=0.0,
    )  # fmt: skip
