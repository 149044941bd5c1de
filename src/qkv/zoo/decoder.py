"""What the decoders that grew from LLaMA share: attention, windows, blocks and heads."""

from typing import Any

from qkv.masks import Causal, Full, Mask, Window
from qkv.models import Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    Gated,
    Head,
    Mixer,
    Norm,
    Output,
    Pool,
    Position,
    RMSNorm,
    ScaledDot,
    Score,
    Span,
    Stack,
    Tagger,
    Tokens,
)
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.rope import rotary


def attention(
    c: Config,
    *,
    bias: bool | str = False,
    norm: Norm | None = None,
    mask: Mask | None = None,
    position: Position | None = None,
    score: Score | None = None,
) -> Attention:
    return Attention(
        c.integer("num_attention_heads"),
        kv_heads=c.optional("num_key_value_heads"),
        head_width=c.optional("head_dim"),
        mask=mask or Full(),
        score=score or ScaledDot(),
        position=position or rotary(c),
        norm=norm,
        bias=bias,
        dropout=c.number("attention_dropout", 0.0),
    )


def window(c: Config) -> Mask:
    size = c.optional("sliding_window")
    return Window(size) if size else Full()


def layer_types(c: Config, kinds: list[str], depth: int) -> list[str]:
    c.ignore("sliding_window")
    known = ("full_attention", "sliding_attention")
    if len(kinds) != depth or not set(kinds) <= set(known):
        c.only("layer_types", [])
    return kinds


def decoder(c: Config, attentions: list[Attention], ffn: Mixer | None = None, dropout: float = 0.0) -> Sequence:
    """Blocks that differ at most in their attention."""
    c.ignore("max_position_embeddings")
    norm = RMSNorm(c.number("rms_norm_eps", 1e-6))
    ffn = ffn or Gated(c.integer("intermediate_size"), act=c.act("hidden_act", "silu"))
    last = Branch(ffn, pre=norm, dropout=dropout)
    blocks = [Block(attn=Branch(f, pre=norm, dropout=dropout), ffn=last) for f in attentions]
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size")),
        stack=Stack(rolled(blocks), depth=c.depth("num_hidden_layers")),
        mask=Causal(),
        norm=norm,
        head=head(c),
    )


def head(
    c: Config, default: bool = False, softcap: float | None = None, matrix: str = "lm_head.weight"
) -> Output | None:
    """What a decoder's class puts on top; `default` is whether an untold head is tied, else `matrix` is its own."""
    tied = c.tied(matrix, default)
    if c.task == "CausalLM":
        return Head(tied=tied, softcap=softcap)
    if c.task == "SequenceClassification":
        return Classifier(c.labels(), pool=Pool("last"), bias=False)
    if c.task == "TokenClassification":
        return Tagger(c.labels(), dropout=c.number("classifier_dropout", c.number("hidden_dropout", 0.1)))
    if c.task == "QuestionAnswering":
        return Span()
    c.headless()
    return None


def sized(kind: str, name: str, width: int, hidden: int, depth: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": depth, "num_attention_heads": heads, "hidden_act": "silu", **others,
    }  # fmt: skip
