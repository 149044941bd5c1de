"""Commands that turn one form of a model into another, and compare two."""

from pathlib import Path
from typing import Annotated

import typer

from qkv.errors import QkvError


def convert(
    source: Annotated[str, typer.Argument(help="A run, a directory, a .gguf file, or a name that `qkv pull` lists.")],
    target: Annotated[Path, typer.Argument(help="A new directory, or a file that ends in .gguf.")],
    kind: Annotated[
        str | None, typer.Option("--type", help="GGUF's type of the large matrices: F32, F16, BF16, Q8_0, Q4_0, Q4_1.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="A directory's dtype: fp32, bf16 or fp16; left out, as it is.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Write a directory of packed weights, for qkv alone: int8, int8-channel, int4 or bf16."),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read the weights of a .bin file, and nothing else of it.")
    ] = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A key that config.json lacks: model_type=bert.")
    ] = None,
) -> None:
    """Write a model for other tools: a directory that transformers loads, or a GGUF file that llama.cpp loads.

    With --quantize, write it for qkv in a fraction of the memory, and measure what that changes.
    """
    from qkv.checkpoints.gguf import is_gguf
    from qkv.checkpoints.pull import resolve
    from qkv.checkpoints.weights import SPEC
    from qkv.train.run import RUN, dtype_of, open_task
    from qkv.use.convert import convert as write
    from qkv.use.convert import convert_trained

    gguf = is_gguf(target)
    if (gguf and dtype) or (kind and not gguf):
        raise QkvError("--type belongs to a .gguf file and --dtype to a directory")
    if quantize and kind:
        raise QkvError("--quantize writes a directory and --type a .gguf file: give one of them")
    kinds, path = {"kind": kind} if kind else {}, resolve(source)
    if (path / RUN).is_file() or (path / SPEC).is_file():
        if allow_pickle or setting:
            raise QkvError(f"{path} is qkv's own: --allow-pickle and --set belong to what others published")
        lines = convert_trained(open_task(path, dtype), target, bits=quantize, **kinds)
    else:
        lines = write(
            path,
            target,
            dtype=dtype_of(dtype),
            bits=quantize,
            allow_pickle=allow_pickle,
            settings=setting or [],
            **kinds,
        )
    for line in lines:
        print(line)


def diff(
    before: Annotated[str, typer.Argument(help="A run, a preset, a recipe, a directory, a .gguf file, or a name.")],
    after: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Say where two models differ, part by part."""
    from qkv.cli.look import spec_of
    from qkv.look import differences

    changes = differences(spec_of(before), spec_of(after))
    for change in changes:
        print(change)
    if not changes:
        print("the two models are made of the same parts")


COMMANDS = [convert, diff]
