"""One file a family: published facts only."""

from qkv.zoo import bert, gpt, transformer
from qkv.zoo.registry import PRESETS, preset, spec_of

__all__ = ["PRESETS", "bert", "gpt", "preset", "spec_of", "transformer"]
