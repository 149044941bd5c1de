"""Giving a model's passes to a native program, and taking them back."""

import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Module
from qkv.native.builder import Unlowered
from qkv.native.library import Engine, Store, library
from qkv.native.program import Logits, Pass
from qkv.native.tiles import Arena, store_of
from qkv.ops.blocks.packed import Packed
from qkv.ops.blocks.prepacked import prepacked
from qkv.parts.head import VocabularyHead
from qkv.parts.linear import Linear

M = TypeVar("M", bound=Module)


def fast(model: M, threads: int | None = None, *, say: Callable[[str], None] | None = None) -> M:
    """The same model, its passes run by a native program while it is not trained.

    Weights are used as they are kept: floats as floats, and packed blocks with activations of 8 bits. They are copied
    in the order of use: what is changed in the model later is not seen until `fast` is called again.
    Until `slow` takes the passes back, gradients are not followed, no tap listens, and torch keeps to one thread.
    A model with a part for which there is no kernel stays with torch, and `say` is told so once (standard error by
    default). So does any where there is no compiler: torch multiplies packed weights by a kernel of its own, if it can.
    """
    say = say or (lambda line: print(line, file=sys.stderr))
    slow(model)
    model.eval()
    if threads is not None and threads < 1:
        raise QkvError(f"a program runs on 1 thread or more, not on {threads}; None is one for each core")
    if model.device.type != "cpu":
        raise QkvError(f"native programs run on the CPU, and this model is on {model.device}: model.cpu() moves it")
    try:
        library()
    except QkvError as fault:
        say(f"{fault}: {by_torch(model)}")
        return model
    source = getattr(model.origin, "source", None)
    engine, arena = Engine(threads), Arena(getattr(source, "release", None))
    wide = any(store_of(layer.weight) == Store.FLOAT for layer in model.modules() if isinstance(layer, Linear))
    wirings = [model.reading, model.wiring] if isinstance(model, EncoderDecoderModel) else [model.wiring]
    with torch.no_grad():
        try:
            programs = {wiring.path: Pass(engine, arena, wiring, wide) for wiring in wirings}
            table, width = model.wiring.embed.table, programs[model.wiring.path].width
            scores = Logits(engine, arena, model.head, table, width) if isinstance(model.head, VocabularyHead) else None
        except Unlowered as missing:
            say(f"no native kernel for {missing}: this model stays with torch")
            return model
    if arena.release is not None:
        arena.release()
    model.programs, model.scores = dict(programs), scores
    return model


def slow(model: M) -> M:
    """The same model, its passes run by torch, as if it had never been given to `fast`."""
    model.programs, model.scores = {}, None
    for weight in packed(model):
        weight.served = None
    return model


def by_torch(model: Module) -> str:
    """Bring packed weights into the form that torch multiplies best → what that means."""
    weights = packed(model)
    for weight in weights:
        weight.served = prepacked(weight)
    served = sum(weight.served is not None for weight in weights)
    lost = "torch runs this model, several times more slowly"
    if not served:
        return lost
    return f"{lost}, and multiplies {served} of {len(weights)} packed weights with activations in bfloat16"


def packed(model: Module) -> list[Packed]:
    return [weight for weight in model.parameters() if isinstance(weight, Packed)]
