"""Opening a model to be used: run by qkv's native program where there is a kernel for each of its parts."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkv.errors import QkvError

if TYPE_CHECKING:
    from torch import Tensor

    from qkv.use import Task

Torch = Annotated[bool, typer.Option("--torch", help="Let torch run the model, not qkv's native program.")]


def opened(
    model: str, dtype: str | None = None, adapters: list[Path] | None = None, *,
    torch: bool = False, last: bool = False, quiet: bool = False,
) -> "Task":  # fmt: skip
    """The model with its tokenizer and adapters; what it is goes to stderr, unless `quiet`.

    A .gguf file's weights stay packed where the native program runs them.
    """
    from qkv.checkpoints.gguf import is_gguf
    from qkv.checkpoints.pull import resolve
    from qkv.train.run import open_task

    path = resolve(model)
    packed = not (torch or dtype or adapters) and is_gguf(path)
    task = open_task(path, dtype, last=last, packed=packed)
    for n, folder in enumerate(adapters or [], 1):
        from qkv.adapt import load_adapter

        load_adapter(task.model, folder, f"adapter-{n}")
    if not quiet:
        kinds: Counter[str] = Counter()
        for weight in task.model.parameters():
            kinds[kept(weight)] += weight.numel()
        print(f"{task.model.count():,} parameters, {kinds.most_common(1)[0][0]}", file=sys.stderr)
        if task.continues and task.manner.unheeded:
            print(f"qkv does not follow its settings {', '.join(task.manner.unheeded)}", file=sys.stderr)
    if not torch:
        hurried(task, bool(adapters))
    return task


def kept(weight: "Tensor") -> str:
    """How a weight is kept: in which blocks, or as what numbers."""
    return str(getattr(weight, "format", weight.dtype)).removeprefix("torch.")


def hurried(task: "Task", adapted: bool) -> None:
    """Give the model to the native program, adapters merged; where torch runs it, dequantise what it is slow with."""
    from qkv.adapt import dequantise, merge
    from qkv.native import fast

    try:
        if adapted:
            merge(task.model)
        fast(task.model)
    except QkvError as fault:  # a packed weight that takes in no adapter, say
        print(f"torch runs this model, several times more slowly: {fault}", file=sys.stderr)
    if not task.model.programs and not adapted:
        dequantise(task.model, lambda weight: weight.served is None)
