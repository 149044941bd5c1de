"""One file a family: published facts only."""

from qkv.zoo import (
    albert,
    bart,
    bert,
    distilbert,
    electra,
    falcon,
    gemma,
    gpt,
    gpt1,
    gpt2,
    llama,
    mamba,
    marian,
    mistral,
    mixtral,
    modernbert,
    neox,
    phi3,
    qwen,
    roberta,
    t5,
    transformer,
)
from qkv.zoo.registry import FAMILIES, PRESETS, family_of, preset, spec_from, spec_of

__all__ = [
    "FAMILIES", "PRESETS", "albert", "bart", "bert", "distilbert", "electra", "falcon", "family_of", "gemma", "gpt",
    "gpt1", "gpt2", "llama", "mamba", "marian", "mistral", "mixtral", "modernbert", "neox", "phi3", "preset", "qwen",
    "roberta", "spec_from", "spec_of", "t5", "transformer",
]  # fmt: skip
