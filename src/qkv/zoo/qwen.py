"""Qwen2 and Qwen3: LLaMA with biases on queries, keys and values, then with norms on queries and keys instead."""

from typing import Any

from qkv.masks import Full, Mask
from qkv.models import Sequence
from qkv.parts import RMSNorm
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, decoder, layer_types, sized, window
from qkv.zoo.llama import names
from qkv.zoo.registry import family, preset


@family("qwen2", names=names, prefix="model.")
def qwen2(c: Config) -> Sequence:
    """Qwen2: queries, keys and values have biases (Yang 2024)."""
    c.only("use_mrope", False)
    return decoder(c, [attention(c, bias="qkv", mask=mask) for mask in windows(c)])


@family("qwen3", names=names, prefix="model.")
def qwen3(c: Config) -> Sequence:
    """Qwen3: queries and keys are normalised, head by head (Yang 2025)."""
    norm, bias = RMSNorm(c.number("rms_norm_eps", 1e-6)), c.flag("attention_bias", False)
    return decoder(c, [attention(c, bias=bias, norm=norm, mask=mask) for mask in windows(c)])


def windows(c: Config) -> list[Mask]:
    """The mask of each layer: all see everything, or some only a window."""
    depth, kinds = c.depth("num_hidden_layers"), c.list("layer_types", str)
    used, first = c.flag("use_sliding_window", False), c.integer("max_window_layers", 28, least=0)
    if not kinds:
        kinds = ["sliding_attention" if used and n >= first else "full_attention" for n in range(depth)]
    return [window(c) if kind == "sliding_attention" else Full() for kind in layer_types(c, kinds, depth)]


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
