"""What a build of the kernels computes, to be compared with another build: `python -m tests.native.sample FILE`.

Optimised less, for the time that a compiler takes; that changes no result.
"""

import sys
from typing import Any

import numpy as np
import torch

from qkv.models import EncoderDecoder
from qkv.native import build, fast
from qkv.native.library import INPUT, OUTPUT, Kind
from qkv.native.tiles import Arena, store_of
from tests.contracts.specs import VOCAB, decoders, pairs, rough, shrunk
from tests.native.helpers import FORMATS, run, weight

MODELS = [
    "gpt2", "smollm2-135m", "gemma-2-2b", "mixtral-8x7b", "mamba-130m", "mamba2-130m", "mixer retention", "mixer gla",
    "mixer kda", "mixer rwkv6", "t5-small", "position alibi", "norm dyt", "norm batchnorm", "bert-tiny",
]  # fmt: skip


@torch.no_grad()
def sample() -> dict[str, np.ndarray[Any, Any]]:
    """Products of packed weights, which are whole numbers until they are scaled, and the outputs of models."""
    found = {}
    for format in FORMATS:
        w = weight(format, 40, 512)
        x = torch.randn(23, 512, generator=torch.Generator().manual_seed(1))
        common = {"out": OUTPUT, "store": store_of(w), "weight": Arena().tiles([w])}
        product = {"kind": Kind.LINEAR, "in": INPUT, "inputs": 512, "outputs": 40, **common}
        found[f"product {format}"] = run([product], [512, 40], len(x), input=x)
        rows = {"kind": Kind.EMBED, "outputs": 512, **common}
        found[f"rows {format}"] = run([rows], [0, 512], 40, tokens=torch.arange(40, dtype=torch.int32))
    ids = torch.randint(VOCAB, (3, 70), generator=torch.Generator().manual_seed(1))[:, :39]
    specs = {**decoders(), **pairs(), "bert-tiny": shrunk("bert-tiny")}
    for name in MODELS:
        for kind, dtype in (("floats", torch.float32), ("halves", torch.bfloat16)):
            model = fast(rough(specs[name]).to(dtype))
            memory = model.encode(ids) if isinstance(specs[name], EncoderDecoder) else {}
            found[f"{kind} {name}"] = model(ids, **memory)
    return {name: one.numpy() for name, one in found.items()}


if __name__ == "__main__":
    build.FLAGS = tuple("-O1" if flag == "-O3" else flag for flag in build.FLAGS)
    np.savez(sys.argv[1], **sample())
