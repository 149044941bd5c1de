"""One file a family: published facts only."""

from qkv.zoo import bert, gpt, llama, transformer
from qkv.zoo.registry import FAMILIES, PRESETS, family_of, preset, spec_from, spec_of

__all__ = [
    "FAMILIES", "PRESETS", "bert", "family_of", "gpt", "llama", "preset", "spec_from", "spec_of", "transformer",
]  # fmt: skip
