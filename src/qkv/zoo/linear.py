"""What the language models with a memory share, as the flash-linear-attention library publishes them (fla-hub)."""

from typing import Any

from qkv.errors import QkvError
from qkv.masks import Causal
from qkv.models import Sequence
from qkv.parts import Block, Branch, Gated, Head, Mixer, RMSNorm, Stack, Tokens
from qkv.zoo.config import Config

NAMES = """
    model.embeddings                                    embed.tokens
    model.layers.{i}.attn_norm                          stack.{i}.attn.pre
    model.layers.{i}.attn.{q,k,v,o}_proj                stack.{i}.attn.f.{q,k,v,o}
    model.layers.{i}.attn.{q,k,v}_conv1d.weight         stack.{i}.attn.f.{q,k,v}_conv.weight    squeeze:1
    model.layers.{i}.attn.g_proj                        stack.{i}.attn.f.gate.up
    model.layers.{i}.mlp_norm                           stack.{i}.ffn.pre
    model.layers.{i}.mlp.{gate,up,down}_proj            stack.{i}.ffn.f.{gate,up,down}
    model.norm                                          norm
    lm_head                                             head
    = lm_head                                           embed.tokens
"""


def decoder(c: Config, f: Mixer) -> Sequence:
    """Blocks of a memory and a gated feed-forward; which kernels compute them is left out."""
    norm = RMSNorm(c.number("norm_eps", 1e-6))
    c.only("hidden_act", "swish")
    ffn = Gated(hidden(c, 2 / 3 * c.number("hidden_ratio", 4), 256))
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size")),
        stack=Stack(Block(attn=Branch(f, pre=norm), ffn=Branch(ffn, pre=norm)), depth=c.depth("num_hidden_layers")),
        mask=Causal(),
        norm=norm,
        head=head(c),
    )


def head(c: Config) -> Head | None:
    """What is on top, once the keys have been read that all these models have and no part needs."""
    c.ignore("attn_mode", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")
    c.ignore("max_position_embeddings")
    c.only("attn")  # layers of attention between the others
    c.only("attnres_block_size")
    if c.task not in ("CausalLM", ""):
        c.headless()
    shared = c.tied("lm_head.weight", False)
    return Head(tied=shared) if c.task else None


def hidden(c: Config, ratio: float, multiple: int) -> int:
    """The width of a feed-forward: as it says, else a ratio of the model's, rounded up to a multiple."""
    c.ignore("hidden_ratio")
    return c.optional("intermediate_size") or -(-int(c.integer("hidden_size") * ratio) // multiple) * multiple


def share(c: Config, key: str, default: float, heads: int) -> int:
    """What each head has of so many times the model's width."""
    whole = c.number(key, default) * c.integer("hidden_size")
    if whole <= 0 or whole % heads:
        raise QkvError(f"{c.where}: {key} × hidden_size is {whole:g}, which {heads} heads cannot share")
    return int(whole) // heads


def sized(kind: str, name: str, width: int, hidden: int, depth: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": depth, "num_heads": heads, "vocab_size": 32000, "hidden_act": "swish", "norm_eps": 1e-6,
        "tie_word_embeddings": False, **others,
    }  # fmt: skip
