"""The command that measures a model on this machine."""

import dataclasses as dc
import json
from typing import Annotated

import typer

from qkv.cli.run import As_json
from qkv.cli.use import Dtype, Model


def bench(
    model: Model,
    threads: Annotated[int | None, typer.Option(help="So many threads; left out, as many as torch takes.")] = None,
    seconds: Annotated[float, typer.Option(help="About so long for each measurement.")] = 1.0,
    dtype: Dtype = None,
    as_json: As_json = False,
) -> None:
    """Measure how fast a model runs here, natively and by torch, and how near that is to what the machine can do."""
    from qkv.look.bench import bench as measured

    found = measured(model, dtype=dtype, threads=threads, seconds=seconds)
    print(json.dumps(dc.asdict(found), ensure_ascii=False) if as_json else found)


COMMANDS = [bench]
