"""ModernBERT: pre-norm, rotary positions, gated feed-forwards, and windows in two layers of three (Warner 2024)."""

from typing import Any

from qkv.masks import Full, Mask, Window
from qkv.models import Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    Gated,
    Head,
    LayerNorm,
    Norm,
    Output,
    Pool,
    Rotary,
    Span,
    Stack,
    Tagger,
    Tokens,
    Transform,
)  # fmt: skip
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.decoder import layer_types
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import rotary

NAMES = """
    model.embeddings.tok_embeddings         embed.tokens
    model.embeddings.norm                   embed.norm
    model.layers.{i}.attn_norm              stack.{i}.attn.pre
    model.layers.{i}.attn.Wqkv              stack.{i}.attn.f.{q,k,v}
    model.layers.{i}.attn.Wo                stack.{i}.attn.f.o
    model.layers.{i}.mlp_norm               stack.{i}.ffn.pre
    model.layers.{i}.mlp.Wi                 stack.{i}.ffn.f.{gate,up}
    model.layers.{i}.mlp.Wo                 stack.{i}.ffn.f.down
    model.final_norm                        norm
    head.{dense,norm}                       head.transform.{dense,norm}
    head.{dense,norm}                       head.pool.transform.{dense,norm}
    decoder                                 head
    = decoder.weight                        embed.tokens.weight
    classifier                              head.out
    classifier                              head.ends
"""

UNREAD = """
    initializer_cutoff_factor deterministic_flash_attn reference_compile repad_logits_with_grad sparse_prediction
    sparse_pred_ignore_index layer_norm_eps position_embedding_type
"""
"""How weights start, kernels and losses; and two keys of the first files that nothing reads."""


@family("modernbert", names=NAMES, prefix="model.")
def modernbert(c: Config) -> Sequence:
    """ModernBERT and Ettin's encoders."""
    c.ignore(*UNREAD.split())
    c.only("mlp_dropout", 0.0)
    norm = LayerNorm(c.number("norm_eps", 1e-5), bias=c.flag("norm_bias", False))
    wide, near = theta(c)
    looks = {
        "full_attention": attention(c, Full(), rotary(c, layers="full_attention", theta=wide)),
        "sliding_attention": attention(c, window(c), rotary(c, layers="sliding_attention", theta=near)),
    }
    act, bias = c.act("hidden_activation", "gelu"), c.flag("mlp_bias", False)
    ffn = Branch(Gated(c.integer("intermediate_size"), act=act, bias=bias), pre=norm)
    blocks = [
        Block(attn=Branch(looks[kind], pre=norm if n else None, dropout=looks[kind].dropout), ffn=ffn)
        for n, kind in enumerate(layers(c))
    ]
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size"), norm=norm, dropout=c.number("embedding_dropout", 0.0)),
        stack=Stack(rolled(blocks), depth=len(blocks)),
        mask=Full(),
        norm=norm,
        head=head(c, norm),
    )


def attention(c: Config, mask: Mask, position: Rotary) -> Attention:
    bias, dropout = c.flag("attention_bias", False), c.number("attention_dropout", 0.0)
    return Attention(c.integer("num_attention_heads"), mask=mask, position=position, bias=bias, dropout=dropout)


def window(c: Config) -> Window:
    """`local_attention` counts both sides; the token itself comes on top."""
    return Window(c.integer("local_attention", 128) // 2 + 1)


def theta(c: Config) -> tuple[float, float]:
    """Of the layers that see everything and of those with a window, where `rope_parameters` does not say."""
    wide, near = c.number("global_rope_theta", 160000.0), c.number("local_rope_theta", 10000.0)
    return wide, wide if c.values.get("local_rope_theta", near) is None else near  # null: as in the other layers


def layers(c: Config) -> list[str]:
    """What each layer sees; of old every n-th one everything."""
    depth, every = c.depth("num_hidden_layers"), c.integer("global_attn_every_n_layers", 3)
    named = ["sliding_attention" if n % every else "full_attention" for n in range(depth)]
    return layer_types(c, c.list("layer_types", str) or named, depth)


def head(c: Config, norm: Norm) -> Output | None:
    """Every head reads a transform of each token, or of the text's one vector."""
    c.only("classifier_pooling", "cls", "mean")
    tied, decoder_bias = c.flag("tie_word_embeddings", True), c.flag("decoder_bias", True)
    act, dropout = c.act("classifier_activation", "gelu"), c.number("classifier_dropout", 0.0)
    transform = Transform(act, norm=norm, bias=c.flag("classifier_bias", False))
    pool = Pool("mean" if c.text("classifier_pooling", "cls") == "mean" else "first", transform=transform)
    if c.task == "MaskedLM":
        return Head(tied=tied, bias=decoder_bias, transform=transform)
    if c.task == "SequenceClassification":
        return Classifier(c.labels(), pool=pool, dropout=dropout)
    if c.task == "TokenClassification":
        return Tagger(c.labels(), transform=transform, dropout=dropout)
    if c.task == "QuestionAnswering":
        return Span(transform=transform, dropout=dropout)
    c.headless()
    return None


@preset("modernbert-base")
def base() -> dict[str, Any]:
    """22 layers 768 wide, 149 M parameters (Warner 2024)."""
    return {
        "model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "vocab_size": 50368,
        "hidden_size": 768, "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152,
        "hidden_activation": "gelu", "norm_eps": 1e-5, "norm_bias": False, "attention_bias": False, "mlp_bias": False,
        "decoder_bias": True, "classifier_bias": False, "classifier_activation": "gelu", "classifier_pooling": "mean",
        "classifier_dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0, "local_attention": 128,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "pad_token_id": 50283, "bos_token_id": 50281,
        "eos_token_id": 50282, "cls_token_id": 50281, "sep_token_id": 50282,
    }  # fmt: skip
