"""LLaMA and what grew from it: pre-norm, rotary positions, grouped queries, gated feed-forward (Touvron 2023)."""

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
)  # fmt: skip
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.registry import family, preset
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
    c.only("rope_interleaved", False)
    c.ignore("is_llama_config")
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
    return Span() if c.task == "QuestionAnswering" else None


def sized(kind: str, name: str, width: int, hidden: int, depth: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": depth, "num_attention_heads": heads, "hidden_act": "silu", **others,
    }  # fmt: skip


@preset("smollm2-135m")
def smollm2() -> dict[str, Any]:
    """SmolLM2: 30 layers 576 wide, 135 M parameters (Ben Allal 2025)."""
    return sized(
        "llama", "Llama", 576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=100000, rope_scaling=None, tie_word_embeddings=True, attention_bias=False,
        attention_dropout=0.0, pretraining_tp=1,
    )  # fmt: skip


@preset("llama-2-7b")
def llama_2() -> dict[str, Any]:
    """LLaMA 2: 32 layers 4096 wide, 6.7 B parameters (Touvron 2023)."""
    return sized(
        "llama", "Llama", 4096, 11008, 32, 32, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096,
        rms_norm_eps=1e-5, rope_scaling=None, tie_word_embeddings=False, pretraining_tp=1,
    )  # fmt: skip


def llama_3(width: int, hidden: int, depth: int, factor: float, tied: bool) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    return sized(
        "llama", "Llama", width, hidden, depth, 32, num_key_value_heads=8, vocab_size=128256,
        max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=500000.0, rope_scaling=rope,
        tie_word_embeddings=tied, attention_bias=False, attention_dropout=0.0, mlp_bias=False, pretraining_tp=1,
    )  # fmt: skip


@preset("llama-3.1-8b")
def llama_3_1() -> dict[str, Any]:
    """LLaMA 3.1: 32 layers 4096 wide, 8.0 B parameters (Dubey 2024)."""
    return llama_3(4096, 14336, 32, factor=8.0, tied=False)


@preset("llama-3.2-1b")
def llama_3_2() -> dict[str, Any]:
    """LLaMA 3.2: 16 layers 2048 wide, 1.2 B parameters (Dubey 2024)."""
    return {**llama_3(2048, 8192, 16, factor=32.0, tied=True), "head_dim": 64}


@preset("mistral-7b")
def mistral_7b() -> dict[str, Any]:
    """Mistral 0.1: 32 layers 4096 wide with a window of 4096, 7.2 B parameters (Jiang 2023)."""
    return sized(
        "mistral", "Mistral", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32000,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
        tie_word_embeddings=False,
    )  # fmt: skip


@preset("qwen2-0.5b")
def qwen2_small() -> dict[str, Any]:
    """Qwen2: 24 layers 896 wide, 494 M parameters (Yang 2024)."""
    return sized(
        "qwen2", "Qwen2", 896, 4864, 24, 14, num_key_value_heads=2, vocab_size=151936, max_position_embeddings=131072,
        max_window_layers=24, sliding_window=131072, use_sliding_window=False, rms_norm_eps=1e-6, rope_theta=1000000.0,
        tie_word_embeddings=True, attention_dropout=0.0,
    )  # fmt: skip


@preset("qwen3-0.6b")
def qwen3_small() -> dict[str, Any]:
    """Qwen3: 28 layers 1024 wide, 596 M parameters (Yang 2025)."""
    return sized(
        "qwen3", "Qwen3", 1024, 3072, 28, 16, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        max_position_embeddings=40960, max_window_layers=28, sliding_window=None, use_sliding_window=False,
        rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None, tie_word_embeddings=True, attention_bias=False,
        attention_dropout=0.0,
    )  # fmt: skip
