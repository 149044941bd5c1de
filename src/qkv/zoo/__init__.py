"""One file a family: published facts only."""

from qkv.zoo import (
    albert,
    bamba,
    bart,
    bert,
    deltanet,
    distilbert,
    electra,
    falcon,
    gemma,
    gla,
    gpt,
    gpt1,
    gpt2,
    jamba,
    linear,
    llama,
    mamba,
    marian,
    mistral,
    mixtral,
    modernbert,
    neox,
    phi3,
    qwen,
    retnet,
    rnn,
    roberta,
    rwkv6,
    samba,
    t5,
    transformer,
)
from qkv.zoo.registry import FAMILIES, PRESETS, family_of, preset, spec_from, spec_of

__all__ = [
    "FAMILIES", "PRESETS", "albert", "bamba", "bart", "bert", "deltanet", "distilbert", "electra", "falcon",
    "family_of", "gemma", "gla", "gpt", "gpt1", "gpt2", "jamba", "linear", "llama", "mamba", "marian", "mistral",
    "mixtral", "modernbert", "neox", "phi3", "preset", "qwen", "retnet", "rnn", "roberta", "rwkv6", "samba",
    "spec_from", "spec_of", "t5", "transformer",
]  # fmt: skip
