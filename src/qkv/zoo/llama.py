"""LLaMA: a decoder with pre-norm, rotary positions, grouped queries and gated feed-forwards (Touvron 2023)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Gated, Span
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, decoder, sized
from qkv.zoo.registry import family, preset

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


def names(spec: Sequence) -> str:
    """Models that find answers call their body `transformer`."""
    return NAMES.replace(" model.", " transformer.") if isinstance(spec.head, Span) else NAMES


@family("llama", names=names, prefix="model.")
def llama(c: Config) -> Sequence:
    """LLaMA 1 to 3, SmolLM2 and others that say so."""
    c.only("pretraining_tp", 1)
    c.only("rope_interleaved", False)
    c.ignore("is_llama_config", "max_sequence_length")
    ffn = Gated(c.integer("intermediate_size"), act=c.act("hidden_act", "silu"), bias=c.flag("mlp_bias", False))
    return decoder(c, [attention(c, bias=c.flag("attention_bias", False))], ffn)


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
