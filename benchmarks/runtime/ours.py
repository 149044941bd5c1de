"""Models as qkv runs them fastest."""

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

import torch
from benchmarks.runtime.turns import Settings, in_process
from torch import nn

from qkv.checkpoints.gguf_model import load_gguf
from qkv.checkpoints.opening import opened
from qkv.checkpoints.pull import resolve
from qkv.models import Module
from qkv.native import fast
from qkv.ops.blocks import quantise
from qkv.ops.blocks.packed import Packed
from qkv.parts.linear import Linear
from qkv.use.convert import convert
from qkv.use.published import tokenizer_of

M = TypeVar("M", bound=Module)
SMOL = "smollm2-135m-instruct"


def decoder(path: Path, threads: int) -> Module:
    """The model of a .gguf file, run natively on the blocks as they are."""
    torch.set_num_threads(threads)
    return native(load_gguf(path, packed=True), threads)


def native(model: M, threads: int) -> M:
    """A model run natively; where it is not, no figure is to say so."""
    said: list[str] = []
    fast(model, threads, say=said.append)
    if not model.programs:
        raise RuntimeError(*said)
    return model


def packed(model: M, kind: str) -> M:
    """The same model, its matrices and tables of tokens in blocks."""
    for module in [*(one for one in model.modules() if isinstance(one, Linear)), model.wiring.embed.lookup]:
        module.weight = nn.Parameter(Packed(kind, quantise(kind, module.weight)), requires_grad=False)
    return model


# --- SmolLM2 ---


@cache
def files(settings: Settings) -> dict[str, Path]:
    """SmolLM2 as it is pulled, and as `qkv convert` writes it from the same weights; by the type of its matrices."""
    found = {"Q4_1": resolve(SMOL)}
    for kind in ("Q8_0", "Q4_0"):
        found[kind] = settings.folder / f"smollm2-{kind}.gguf"
        in_process(convert_to, found["Q4_1"], found[kind], kind)
    return found


def convert_to(source: Path, target: Path, kind: str) -> None:
    convert(source, target, kind=kind)


@cache
def prompt(length: int) -> tuple[int, ...]:
    """The ids with which plain English begins."""
    return tuple(tokenizer_of(opened(resolve(SMOL))).encode(english()[: 20 * length])[:length])


def english() -> str:
    """Python's own manual."""
    return " ".join(topics[name] for name in sorted(topics))
