"""Models from llama2.c's files."""

from pathlib import Path

import torch

from qkv.checkpoints.llama2c import Llama2C
from qkv.checkpoints.load import load_published
from qkv.models import Model, Module
from qkv.zoo.gguf import head_counts
from qkv.zoo.llama import NAMES as LLAMA_NAMES

LLAMA2C = """
    model.layers.{{i}}.self_attn.q_proj     stack.{{i}}.attn.f.q    rope:{heads}
    model.layers.{{i}}.self_attn.k_proj     stack.{{i}}.attn.f.k    rope:{groups}
"""


def load_llama2c(path: Path | str, dtype: torch.dtype = torch.float32) -> Module:
    """The model of llama2.c's file of version 0, in evaluation mode."""
    return load_published(Llama2CModel(path), dtype)


class Llama2CModel(Llama2C):
    """llama2.c's file as a source of a model."""

    dtype = torch.float32
    head = None

    @property
    def keys(self) -> list[str]:
        return list(self.tensors)

    def tables(self, spec: Model) -> list[str]:
        """The family's names; the two members of a rotary pair are neighbours."""
        heads, groups = head_counts(spec)
        return [LLAMA2C.format(heads=heads, groups=groups) + LLAMA_NAMES]
