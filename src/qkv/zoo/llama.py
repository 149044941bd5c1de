"""LLaMA and what grew from it: pre-norm, rotary positions, grouped queries, gated feed-forward (Touvron 2023)."""

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
    RMSNorm,
    Span,
    Stack,
    Tagger,
    Tokens,
)  # fmt: skip
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.registry import family
from qkv.zoo.rope import rotary

NAMES = """
    model.embed_tokens                              embed.tokens
    model.layers.{i}.input_layernorm                stack.{i}.attn.pre
    model.layers.{i}.self_attn.{q,k,v,o}_proj       stack.{i}.attn.f.{q,k,v,o}
    model.layers.{i}.self_attn.{q,k}_norm           stack.{i}.attn.f.{q,k}_norm
    model.layers.{i}.post_attention_layernorm       stack.{i}.ffn.pre
    model.layers.{i}.mlp.{gate,up,down}_proj        stack.{i}.ffn.f.{gate,up,down}
    model.norm                                      norm
    lm_head                                         head
    = lm_head.weight                                embed.tokens.weight
    score                                           head.out
    qa_outputs                                      head.ends
    ~ *.rotary_emb.inv_freq
"""


@family("llama", names=NAMES, prefix="model.")
def llama(c: Config) -> Sequence:
    """LLaMA 1 to 3, SmolLM2 and others that say so."""
    c.only("mlp_bias", False)
    c.only("pretraining_tp", 1)
    return decoder(c, [attention(c, bias=c.flag("attention_bias", False))])


@family("mistral", names=NAMES, prefix="model.")
def mistral(c: Config) -> Sequence:
    """Mistral: a window over the last tokens (Jiang 2023)."""
    return decoder(c, [attention(c, mask=window(c))])


@family("qwen2", names=NAMES, prefix="model.")
def qwen2(c: Config) -> Sequence:
    """Qwen2: queries, keys and values have biases (Yang 2024)."""
    return decoder(c, [attention(c, bias="qkv", mask=mask) for mask in windows(c)])


@family("qwen3", names=NAMES, prefix="model.")
def qwen3(c: Config) -> Sequence:
    """Qwen3: queries and keys are normalised, head by head (Yang 2025)."""
    norm, bias = RMSNorm(c.number("rms_norm_eps", 1e-6)), c.flag("attention_bias", False)
    return decoder(c, [attention(c, bias=bias, norm=norm, mask=mask) for mask in windows(c)])


def attention(c: Config, *, bias: bool | str = False, norm: Norm | None = None, mask: Mask | None = None) -> Attention:
    return Attention(
        c.integer("num_attention_heads"),
        kv_heads=c.optional("num_key_value_heads"),
        head_width=c.optional("head_dim"),
        mask=mask or Full(),
        position=rotary(c),
        norm=norm,
        bias=bias,
        dropout=c.number("attention_dropout", 0.0),
    )


def window(c: Config) -> Mask:
    size = c.optional("sliding_window")
    return Window(size) if size else Full()


def windows(c: Config) -> list[Mask]:
    """The mask of each layer: all see everything, or some only a window."""
    depth, kinds = c.depth("num_hidden_layers"), c.list("layer_types", str)
    used, first = c.flag("use_sliding_window", False), c.integer("max_window_layers", 28, least=0)
    if not kinds:
        kinds = ["sliding_attention" if used and n >= first else "full_attention" for n in range(depth)]
    return [window(c) if kind == "sliding_attention" else Full() for kind in layer_types(c, kinds, depth)]


def layer_types(c: Config, kinds: list[str], depth: int) -> list[str]:
    c.ignore("sliding_window")
    known = ("full_attention", "sliding_attention")
    if len(kinds) != depth or not set(kinds) <= set(known):
        c.only("layer_types", [])
    return kinds


def decoder(c: Config, attentions: list[Attention], ffn: Mixer | None = None) -> Sequence:
    """Blocks that differ at most in their attention."""
    c.ignore("max_position_embeddings")
    norm = RMSNorm(c.number("rms_norm_eps", 1e-6))
    ffn = ffn or Gated(c.integer("intermediate_size"), act=c.act("hidden_act", "silu"))
    blocks = [Block(attn=Branch(f, pre=norm), ffn=Branch(ffn, pre=norm)) for f in attentions]
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size")),
        stack=Stack(rolled(blocks), depth=c.depth("num_hidden_layers")),
        mask=Causal(),
        norm=norm,
        head=head(c),
    )


def head(c: Config, default: bool = False, softcap: float | None = None) -> Output | None:
    """What a decoder's class puts on top."""
    tied = c.tied("lm_head.weight", default)
    if c.task == "CausalLM":
        return Head(tied=tied, softcap=softcap)
    if c.task == "SequenceClassification":
        return Classifier(c.labels(), pool=Pool("last"), bias=False)
    if c.task == "TokenClassification":
        return Tagger(c.labels(), dropout=c.number("classifier_dropout", c.number("hidden_dropout", 0.1)))
    return Span() if c.task == "QuestionAnswering" else None
