"""Commands that make runs."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qkv.errors import QkvError


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe: a TOML file, or the name of a shipped one.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run's folder; runs/RECIPE by default.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Change a field: optimizer.lr=3e-4. May be repeated.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Continue this run as if it had never stopped.")
    ] = None,
) -> None:
    """Train a model as a recipe says."""
    from qkv.recipes import find, shipped
    from qkv.train import Run, Stopped, Trainer, load_recipe, start
    from qkv.train.run import discard

    if (recipe is None) == (resume is None):
        raise QkvError("give either a recipe (`qkv recipes` lists some) or --resume RUN")
    if resume is not None and (setting or out):
        raise QkvError("a resumed run keeps its recipe and folder: leave out --set and --out")
    run: Run | None = None
    try:
        if recipe is not None:
            path = find(recipe)
            base = Path() if recipe in shipped() else path.parent  # a shipped recipe reads the user's own files
            run = start(load_recipe(path, setting or []), out or Path("runs") / path.stem, base)
        else:
            assert resume is not None
            run = Run(resume)
        Trainer(run).train()
    except Stopped as stopped:
        print(f"qkv: {stopped}", file=sys.stderr)
        raise typer.Exit(stopped.code) from None
    except BaseException:  # Ctrl-C too
        if run is not None and resume is None and not run.begun:
            discard(run.folder)
        raise
    print(run.folder)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, to copy and change.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """List the recipes that come with qkv, or print one."""
    from qkv.recipes import find, shipped

    if name is not None:
        print(find(name).read_text(encoding="utf-8"), end="")
        return
    found = shipped()
    firsts = {key: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for key, path in found.items()}
    if as_json:
        print(json.dumps(firsts, indent=2))
        return
    for key, first in firsts.items():
        print(f"{key:12} {first}")


COMMANDS = [train, recipes]
