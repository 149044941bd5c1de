"""Mistral: LLaMA with a window over the last tokens (Jiang 2023)."""

from typing import Any

from qkv.models import Sequence
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, decoder, sized, window
from qkv.zoo.llama import NAMES
from qkv.zoo.registry import family, preset


@family("mistral", names=NAMES, prefix="model.")
def mistral(c: Config) -> Sequence:
    """Mistral: a window over the last tokens (Jiang 2023)."""
    return decoder(c, [attention(c, mask=window(c))])


@preset("mistral-7b")
def mistral_7b() -> dict[str, Any]:
    """Mistral 0.1: 32 layers 4096 wide with a window of 4096, 7.2 B parameters (Jiang 2023)."""
    return sized(
        "mistral", "Mistral", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32000,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
