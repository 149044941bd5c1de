"""Gemma 1 to 3: norms centred at 1, embeddings × √C, from the second on a norm at both ends of a branch (Mesnard 2024).

Gemma 2 caps scores and logits and sees a window in every other layer (Rivière 2024); Gemma 3 normalises queries and
keys, and sees everything in every sixth layer only, whose rotary waves are longer (Kamath 2025).
"""

import re
from typing import Any

from qkv.masks import Causal, Full, Mask, Window
from qkv.models import Model, Sequence
from qkv.parts import Attention, Block, Branch, Gated, RMSNorm, Rotary, ScaledDot, Stack, Tokens
from qkv.parts.stack import rolled
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, head, layer_types, window
from qkv.zoo.llama import NAMES as PLAIN
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import optional, rotary

LOCAL, GLOBAL = "sliding_attention", "full_attention"

NAMES = """
    model.embed_tokens                                      embed.tokens
    model.layers.{i}.{input,post_attention}_layernorm       stack.{i}.attn.{pre,out}
    model.layers.{i}.self_attn.{q,k,v,o}_proj               stack.{i}.attn.f.{q,k,v,o}
    model.layers.{i}.self_attn.{q,k}_norm                   stack.{i}.attn.f.{q,k}_norm
    model.layers.{i}.{pre,post}_feedforward_layernorm       stack.{i}.ffn.{pre,out}
    model.layers.{i}.mlp.{gate,up,down}_proj                stack.{i}.ffn.f.{gate,up,down}
    model.norm                                              norm
    lm_head                                                 head
    = lm_head.weight                                        embed.tokens.weight
    score                                                   head.out
    ~ *.rotary_emb.inv_freq
"""


@family("gemma", names=PLAIN, prefix="model.")
def gemma(c: Config) -> Sequence:
    """Gemma (Mesnard 2024)."""
    c.only("use_bidirectional_attention", False)
    act = c.act("hidden_activation", c.text("hidden_act", "gelu_pytorch_tanh"))
    # The first files say "gelu" and mean the tanh approximation, with which the models were trained.
    ffn = Gated(c.integer("intermediate_size"), act="gelu-tanh" if act == "gelu" else act)
    return decoder(c, [attention(c, bias=c.flag("attention_bias", False))], ffn, out=None)


@family("gemma2", names=NAMES, prefix="model.")
def gemma2(c: Config) -> Sequence:
    """Gemma 2 (Rivière 2024)."""
    c.only("use_bidirectional_attention", False)
    bias, dot = c.flag("attention_bias", False), score(c, softcap=50.0)
    forms = {
        kind: attention(c, bias=bias, mask=mask, score=dot) for kind, mask in ((LOCAL, window(c)), (GLOBAL, Full()))
    }
    return sandwich(c, [forms[kind] for kind in kinds(c, every=2)], softcap=30.0)


@family("gemma3_text", names=NAMES, prefix="model.")
def gemma3(c: Config) -> Sequence:
    """The text part of Gemma 3 (Kamath 2025), and EmbeddingGemma, which reads both ways (Vera 2025)."""
    c.ignore("rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern")
    both, size = c.flag("use_bidirectional_attention", False), c.integer("sliding_window", 4096)
    near: Mask = Window(size // 2 + 1 if both else size)
    every = c.integer("sliding_window_pattern", c.integer("_sliding_window_pattern", 6))
    bias, norm, dot = c.flag("attention_bias", False), centred(c), score(c)
    forms = {
        kind: attention(c, bias=bias, norm=norm, mask=mask, position=turns(c, kind), score=dot)
        for kind, mask in ((LOCAL, near), (GLOBAL, Full()))
    }
    attentions = [forms[kind] for kind in kinds(c, every)]
    return sandwich(c, attentions, Full() if both else Causal())


PARTS = """
    + multi_modal_projector.*
    + vision_tower.*
"""
INSIDE = re.sub(r"(?m)^( +(?:= )?)(?=[mls])", r"\1language_model.", NAMES) + PARTS
UNSAID = {"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
"""What the first files leave out of the text part."""


@family("gemma3", names=INSIDE)
def gemma3_with_images(c: Config) -> Model:
    """The text part of a Gemma 3 that also reads images; the weights that read these are kept and written back."""
    c.ignore("vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index")
    c.only("tie_word_embeddings", True)
    text = c.table("text_config")
    inner = Config({**UNSAID, **text.values, "architectures": ["Gemma3ForCausalLM"]}, c.keys, text.where)
    spec = gemma3(inner)
    inner.close()
    return spec


def turns(c: Config, kind: str) -> Rotary:
    """Layers with a window have short waves, never scaled before each kind had a table of its own."""
    if kind == GLOBAL:
        return rotary(c, layers=kind, theta=1000000.0)
    if "rope_parameters" in c:
        return rotary(c, layers=kind, key="rope_local_base_freq")
    return Rotary(c.number("rope_local_base_freq", 10000.0))


def kinds(c: Config, every: int) -> list[str]:
    """What each layer sees: as listed, or only a window but for one layer in so many."""
    depth = c.depth("num_hidden_layers")
    listed = c.list("layer_types", str) or [LOCAL if (n + 1) % every else GLOBAL for n in range(depth)]
    return layer_types(c, listed, depth)


def score(c: Config, softcap: float | None = None) -> ScaledDot:
    softcap = optional(c, "attn_logit_softcapping", softcap)
    return ScaledDot(c.number("query_pre_attn_scalar", 256.0) ** -0.5, softcap=softcap)


def centred(c: Config) -> RMSNorm:
    return RMSNorm(c.number("rms_norm_eps", 1e-6), offset=1.0)


def sandwich(
    c: Config, attentions: list[Attention], mask: Mask | None = None, softcap: float | None = None
) -> Sequence:
    """Each branch begins and ends with a norm."""
    c.ignore("hidden_act", "cache_implementation")
    ffn = Gated(c.integer("intermediate_size"), act=c.act("hidden_activation", "gelu_pytorch_tanh"))
    return decoder(c, attentions, ffn, out=centred(c), mask=mask, softcap=softcap)


def decoder(
    c: Config,
    attentions: list[Attention],
    ffn: Gated,
    *,
    out: RMSNorm | None,
    mask: Mask | None = None,
    softcap: float | None = None,
) -> Sequence:
    """Blocks that differ at most in their attention; logits are capped as the configuration says, or else so."""
    c.ignore("max_position_embeddings")
    norm = centred(c)
    last = Branch(ffn, pre=norm, out=out)
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size"), scaled=True),
        stack=Stack(
            rolled([Block(attn=Branch(f, pre=norm, out=out), ffn=last) for f in attentions]),
            depth=c.depth("num_hidden_layers"),
        ),
        mask=mask or Causal(),
        norm=norm,
        head=head(c, default=True, softcap=optional(c, "final_logit_softcapping", softcap)),
    )


def sized(kind: str, name: str, width: int, hidden: int, depth: int, heads: int, **others: Any) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [f"{name}ForCausalLM"], "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": depth, "num_attention_heads": heads, "head_dim": 256, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0, **others,
    }  # fmt: skip


@preset("gemma-2b")
def gemma_2b() -> dict[str, Any]:
    """Gemma: 18 layers 2048 wide, 2.5 B parameters (Mesnard 2024)."""
    return sized(
        "gemma", "Gemma", 2048, 16384, 18, 8, num_key_value_heads=1, vocab_size=256000, max_position_embeddings=8192,
        rope_theta=10000.0,
    )  # fmt: skip


@preset("gemma-2-2b")
def gemma_2_2b() -> dict[str, Any]:
    """Gemma 2: 26 layers 2304 wide, 2.6 B parameters (Rivière 2024)."""
    return sized(
        "gemma2", "Gemma2", 2304, 9216, 26, 8, num_key_value_heads=4, vocab_size=256000, max_position_embeddings=8192,
        rope_theta=10000.0, query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )  # fmt: skip


def gemma_3(width: int, hidden: int, depth: int) -> dict[str, Any]:
    return sized(
        "gemma3_text", "Gemma3", width, hidden, depth, 4, num_key_value_heads=1, vocab_size=262144,
        max_position_embeddings=32768, rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=None,
        query_pre_attn_scalar=256, sliding_window=512, sliding_window_pattern=6,
    )  # fmt: skip


@preset("gemma-3-270m")
def gemma_3_270m() -> dict[str, Any]:
    """Gemma 3: 18 layers 640 wide, 268 M parameters, most of them in the embedding (Kamath 2025)."""
    return gemma_3(640, 2048, 18)


@preset("gemma-3-1b")
def gemma_3_1b() -> dict[str, Any]:
    """Gemma 3: 26 layers 1152 wide, 1.0 B parameters (Kamath 2025)."""
    return gemma_3(1152, 6912, 26)
