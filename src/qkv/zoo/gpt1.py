"""GPT: a decoder with post-norm blocks, without a norm at the end (Radford 2018)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, LayerNorm, Learned, Stack, Tokens
from qkv.zoo.config import Config
from qkv.zoo.decoder import head
from qkv.zoo.gpt2 import SUMMARY
from qkv.zoo.registry import family, preset

NAMES = """
    transformer.tokens_embed                    embed.tokens
    transformer.positions_embed                 embed.position
    transformer.h.{i}.attn.c_attn               stack.{i}.attn.f.{q,k,v}    transpose
    transformer.h.{i}.attn.c_proj               stack.{i}.attn.f.o          transpose
    transformer.h.{i}.ln_1                      stack.{i}.attn.post
    transformer.h.{i}.mlp.{c_fc,c_proj}         stack.{i}.ffn.f.{up,down}   transpose
    transformer.h.{i}.ln_2                      stack.{i}.ffn.post
    lm_head                                     head
    = lm_head.weight                            embed.tokens.weight
    score                                       head.out
    ~ *.attn.bias
    ~ transformer.position_ids
"""


@family("openai-gpt", names=NAMES, prefix="transformer.")
def gpt1(c: Config) -> Sequence:
    """The GPT of 2018; its "gelu" is the tanh approximation."""
    c.ignore("n_ctx", "n_special", "predict_special_tokens", *SUMMARY)
    norm, dropout = LayerNorm(c.number("layer_norm_epsilon", 1e-5)), c.number("resid_pdrop", 0.1)
    width, act = c.integer("n_embd"), c.act("afn", "gelu")
    attention = Attention(c.integer("n_head"), bias=True, dropout=c.number("attn_pdrop", 0.1))
    ffn = FeedForward(4 * width, act="gelu-tanh" if act == "gelu" else act)
    block = Block(attn=Branch(attention, post=norm, dropout=dropout), ffn=Branch(ffn, post=norm, dropout=dropout))
    return Sequence(
        width=width,
        embed=Tokens(
            c.integer("vocab_size"),
            position=Learned(c.integer("n_positions", 512)),
            dropout=c.number("embd_pdrop", 0.1),
        ),
        stack=Stack(block, depth=c.depth("n_layer")),
        head=head(c, default=True),
    )


@preset("openai-gpt")
def original() -> dict[str, Any]:
    """12 layers 768 wide, 117 M parameters (Radford 2018)."""
    return {
        "model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "vocab_size": 40478,
        "n_positions": 512, "n_ctx": 512, "n_embd": 768, "n_layer": 12, "n_head": 12, "afn": "gelu",
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip
