"""RWKV-6, Finch: a memory that each token reads before it writes, and a feed-forward that looks back (Peng 2024).

In the names of the flash-linear-attention library (fla-hub); the authors' own files name things otherwise.
"""

from typing import Any

from qkv.errors import QkvError
from qkv.masks import Causal
from qkv.models import Sequence
from qkv.parts import Block, Branch, ChannelMix, LayerNorm, Rwkv6, Stack, Tokens
from qkv.zoo.config import Config
from qkv.zoo.linear import head, hidden, sized
from qkv.zoo.registry import family, preset

NAMES = """
    model.embeddings                                    embed.tokens
    model.layers.0.pre_norm                             embed.norm
    model.layers.{i}.attn_norm                          stack.{i}.attn.pre
    model.layers.{i}.attn.x_proj.0.mu                   stack.{i}.attn.f.mix_all
    model.layers.{i}.attn.x_bias                        stack.{i}.attn.f.mix
    model.layers.{i}.attn.x_proj.0.linear.weight        stack.{i}.attn.f.mix_down
    model.layers.{i}.attn.x_proj.2.weight               stack.{i}.attn.f.mix_up
    model.layers.{i}.attn.{r,k,v,g}_proj.linear         stack.{i}.attn.f.{r,k,v,g}
    model.layers.{i}.attn.w_proj.linear.lora.0          stack.{i}.attn.f.decay_down
    model.layers.{i}.attn.w_proj.linear.lora.2.weight   stack.{i}.attn.f.decay_up.weight
    model.layers.{i}.attn.w_proj.linear.lora.2.bias     stack.{i}.attn.f.decay
    model.layers.{i}.attn.bonus                         stack.{i}.attn.f.u
    model.layers.{i}.attn.g_norm.{weight,bias}          stack.{i}.attn.f.{norm_weight,norm_bias}
    model.layers.{i}.attn.o_proj                        stack.{i}.attn.f.o
    model.layers.{i}.ffn_norm                           stack.{i}.ffn.pre
    model.layers.{i}.ffn.{key,receptance}.mu            stack.{i}.ffn.f.{k_mix,r_mix}
    model.layers.{i}.ffn.{key,receptance}.linear        stack.{i}.ffn.f.{k,r}
    model.layers.{i}.ffn.value                          stack.{i}.ffn.f.v
    model.norm                                          norm
    lm_head                                             head
    = lm_head                                           embed.tokens
"""


@family("rwkv6", names=NAMES, prefix="model.")
def rwkv6(c: Config) -> Sequence:
    """RWKV-6 with keys and values as wide as the model."""
    for key, default in (("expand_k", 0.5), ("expand_v", 1.0)):
        if c.number(key, default) != 1:
            raise QkvError(
                f"{c.where}: {key} is {c.number(key, default)}; qkv runs keys and values as wide as the model"
            )
    eps = c.number("norm_eps", 1e-5)
    norm = LayerNorm(eps, bias=c.flag("norm_bias", True))
    c.only("hidden_act", "sqrelu")
    c.ignore("fuse_norm")
    time = Rwkv6(
        c.integer("num_heads", 4),
        mix_rank=c.integer("proj_low_rank_dim", 32),
        decay_rank=c.integer("gate_low_rank_dim", 64),
        eps=eps,
    )
    channels = ChannelMix(hidden(c, c.number("hidden_ratio", 3.5), 32))
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size"), norm=norm if c.flag("norm_first", True) else None),
        stack=Stack(
            Block(attn=Branch(time, pre=norm), ffn=Branch(channels, pre=norm)), depth=c.depth("num_hidden_layers")
        ),
        mask=Causal(),
        norm=norm,
        head=head(c),
    )


@preset("rwkv6-1.6b")
def rwkv6_1b() -> dict[str, Any]:
    """Finch 1.6B: 24 layers 2048 wide (Peng 2024)."""
    return sized(
        "rwkv6", "RWKV6", 2048, 7168, 24, 32, vocab_size=65536, hidden_act="sqrelu", norm_eps=1e-5, expand_k=1.0,
        expand_v=1.0, hidden_ratio=3.5, proj_low_rank_dim=32, gate_low_rank_dim=64, norm_first=True, norm_bias=True,
    )  # fmt: skip
