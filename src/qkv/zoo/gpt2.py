"""GPT-2: a decoder with pre-norm blocks and learned positions (Radford 2019)."""

from collections.abc import Callable
from typing import Any

from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, LayerNorm, Learned, ScaledDot, Stack, Tagger, Tokens
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.decoder import head
from qkv.zoo.registry import family, preset

NAMES = """
    transformer.wte                             embed.tokens
    transformer.wpe                             embed.position
    transformer.h.{i}.ln_1                      stack.{i}.attn.pre
    transformer.h.{i}.attn.c_attn               stack.{i}.attn.f.{q,k,v}    transpose
    transformer.h.{i}.attn.c_proj               stack.{i}.attn.f.o          transpose
    transformer.h.{i}.ln_2                      stack.{i}.ffn.pre
    transformer.h.{i}.mlp.{c_fc,c_proj}         stack.{i}.ffn.f.{up,down}   transpose
    transformer.ln_f                            norm
    lm_head                                     head
    = lm_head.weight                            embed.tokens.weight
    qa_outputs                                  head.ends
    ~ *.attn.bias
    ~ *.attn.masked_bias
"""


def labelled(names: str) -> Callable[[Sequence], str]:
    """The table with a row for the head: of a text's classes it is called otherwise than of each token's."""
    return lambda spec: f"{names}    {'classifier' if isinstance(spec.head, Tagger) else 'score'}    head.out\n"


@family("gpt2", names=labelled(NAMES), prefix="transformer.")
def gpt2(c: Config) -> Sequence:
    """GPT-2 and DistilGPT2."""
    c.ignore("n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn", *SUMMARY)
    norm, dropout = LayerNorm(c.number("layer_norm_epsilon", 1e-5)), c.number("resid_pdrop", 0.1)
    width, depth = c.integer("n_embd"), c.depth("n_layer")
    hidden, act = c.optional("n_inner") or 4 * width, c.act("activation_function", "gelu_new")
    heads, last = c.integer("n_head"), Branch(FeedForward(hidden, act=act), pre=norm, dropout=dropout)
    attentions = [
        Attention(heads, score=score(c, n), bias=True, dropout=c.number("attn_pdrop", 0.1)) for n in range(depth)
    ]
    blocks = [Block(attn=Branch(f, pre=norm, dropout=dropout), ffn=last) for f in attentions]
    return Sequence(
        width=width,
        embed=Tokens(
            c.integer("vocab_size"),
            position=Learned(c.integer("n_positions", 1024)),
            dropout=c.number("embd_pdrop", 0.1),
        ),
        stack=Stack(rolled(blocks), depth=depth),
        norm=norm,
        head=head(c, default=True),
    )


SUMMARY = (
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
)  # fmt: skip
"""Of a second head, which no published model has."""


def score(c: Config, layer: int) -> ScaledDot:
    """q·k, by the square root of the head's width and by the layer's number from 1, each where asked for."""
    scaled, slowed = c.flag("scale_attn_weights", True), c.flag("scale_attn_by_inverse_layer_idx", False)
    if scaled and not slowed:
        return ScaledDot()
    scale = (c.integer("n_embd") // c.integer("n_head")) ** -0.5 if scaled else 1.0
    return ScaledDot(scale / (layer + 1) if slowed else scale)


def sized(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 1024,
        "n_ctx": 1024, "n_embd": width, "n_layer": depth, "n_head": heads, "activation_function": "gelu_new",
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "layer_norm_epsilon": 1e-5,
    }  # fmt: skip


@preset("gpt2")
def small() -> dict[str, Any]:
    """12 layers 768 wide, 124 M parameters (Radford 2019)."""
    return sized(768, 12, 12)


@preset("gpt2-medium")
def medium() -> dict[str, Any]:
    """24 layers 1024 wide, 355 M parameters (Radford 2019)."""
    return sized(1024, 16, 24)


@preset("gpt2-large")
def large() -> dict[str, Any]:
    """36 layers 1280 wide, 774 M parameters (Radford 2019)."""
    return sized(1280, 20, 36)


@preset("gpt2-xl")
def xl() -> dict[str, Any]:
    """48 layers 1600 wide, 1.6 B parameters (Radford 2019)."""
    return sized(1600, 25, 48)
