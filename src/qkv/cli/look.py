"""Commands that show."""

import dataclasses as dc
import json
import sys
from os.path import exists, isfile  # of names too long for a file as well
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkv.errors import QkvError

if TYPE_CHECKING:
    from qkv.models import Model
    from qkv.use import Task


def look(
    model: Annotated[str, typer.Argument(help="A run, a directory, a .gguf file, or a name that `qkv pull` lists.")],
    text: Annotated[
        str | None, typer.Argument(help="The text to watch the model read; left out: a run's report alone.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder of the pictures; RUN/look or ./look by default.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Only this layer, from 1, with --head as one large picture.")
    ] = None,
    head: Annotated[int | None, typer.Option(help="Only this head, from 1.")] = None,
) -> None:
    """Draw the attention over a text, and where experts read it; of a run also the loss curve and the report."""
    from qkv.checkpoints.whole import make_folder
    from qkv.look import curves, write_report
    from qkv.look.fonts import require
    from qkv.train import Run, evaluate
    from qkv.train.run import RUN, open_task

    run = Path(model) if isfile(f"{model}/{RUN}") else None
    if run is None and text is None:
        raise QkvError(f"{model} is no run, of which there would be a report: give a text for the model to read")
    if out is not None and out.exists() and not out.is_dir():
        raise QkvError(f"{out} is a file: --out names the folder of the pictures")
    require("matplotlib")
    task, folder = open_task(model), out or (Path("look") if run is None else run / "look")
    if text is not None:
        draw(task, text, folder, layer, head)
    if run is None:
        return
    opened = Run(run)
    make_folder(folder)
    if opened.metrics():
        print(curves(opened.metrics(), path=folder / "curves.png"))
    texts, scores, recipe = [text] if text is not None else [], None, opened.recipe
    if recipe.data.valid is not None:
        try:
            scores = evaluate(task, recipe, recipe.data.valid, opened.base, examples=recipe.evaluation.examples)
        except QkvError as fault:
            print(f"qkv: the report has no scores and samples: {fault}", file=sys.stderr)
    title = run.resolve().name
    print(write_report(opened, task, folder / "report.html", title=title, scores=scores, texts=texts))


def draw(task: "Task", text: str, folder: Path, layer: int | None, head: int | None) -> None:
    """The attention maps of a text, and of the answer to it; and the maps of its routing."""
    from qkv.checkpoints.whole import make_folder
    from qkv.look import attend, attention_grid, attention_map, route, routing_map

    answer = task.predict([text])[0][0] if task.pairs else None
    views = attend(task, text, answer)
    if views:
        picked(layer, max(one.numbers[-1] for one in views), "layer")
    if answer is not None:
        print(answer.text)
    for one in views:
        layers = [n for n, number in enumerate(one.numbers) if layer in (None, number)]
        if not layers:
            continue
        path, heads = folder / f"{one.kind}.png", picked(head, one.weights.shape[1], "head")
        weights = one.weights[layers][:, heads]
        make_folder(folder)
        if weights.shape[:2] == (1, 1):
            title = f"{one.kind}, layer {one.numbers[layers[0]]}, head {heads[0] + 1}"
            print(attention_map(weights[0, 0], one.rows, one.columns, title=title, measure=one.measure, path=path))
        else:
            titles = [f"layer {one.numbers[n]}, head {m + 1}" for n in layers for m in heads]
            print(attention_grid(weights, one.rows, one.columns, titles=titles, measure=one.measure, path=path))
    for routing in route(task, text, answer):
        make_folder(folder)
        print(routing_map(routing, path=folder / f"routing-{routing.kind}.png"))


def picked(number: int | None, size: int, what: str) -> list[int]:
    if number is not None and not 1 <= number <= size:
        raise QkvError(f"there is no {what} {number}: the model has {what}s 1 to {size}")
    return list(range(size)) if number is None else [number - 1]


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="A run, a preset, a recipe, a directory, a .gguf file, or a name; left out: the presets."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of the sequence; 128, or all that the model takes.")
    ] = None,
    vocabulary: Annotated[
        int, typer.Option("--vocab", help="The size where the model takes it from a tokenizer.")
    ] = 32000,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Show a model as a tree of parts: shapes, parameters, FLOPs and cache bytes; or list the presets."""
    from qkv.look import inspect as examine
    from qkv.spec import edit
    from qkv.train.recipe import vocabularies

    if vocabulary < 1:
        raise QkvError(f"a vocabulary has at least 1 token, not {vocabulary}")
    if model is None:
        presets(as_json)
        return
    spec = spec_of(model)
    for path, size in vocabularies(spec).items():
        if size is None:
            spec = edit(spec, path, vocabulary)
    inspection = examine(spec, length)
    if as_json:
        print(json.dumps(dc.asdict(inspection), indent=2))
        return
    print(inspection)


def presets(as_json: bool) -> None:
    """Every preset, with what it is."""
    from qkv.zoo import PRESETS

    found = {name: (make.__doc__ or "").strip().partition("\n")[0] for name, make in PRESETS.items()}
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for name, told in found.items():
        print(f"{name:22} {told}")


def spec_of(name: str) -> "Model":
    """The model spec of a run, a recipe, a preset or a checkpoint; no weight is read."""
    from qkv.checkpoints.load import described
    from qkv.checkpoints.opening import opened
    from qkv.checkpoints.packages import PACKAGES
    from qkv.checkpoints.pull import resolve
    from qkv.checkpoints.weights import SPEC, read_json
    from qkv.models import Model
    from qkv.recipes import find, shipped
    from qkv.spec import load, nearest
    from qkv.train import Run, load_recipe
    from qkv.train.run import RUN
    from qkv.zoo import PRESETS
    from qkv.zoo import spec_of as preset

    if isfile(f"{name}/{RUN}"):
        return Run(Path(name)).recipe.model
    if isfile(f"{name}/{SPEC}"):
        made: Model = load(read_json(Path(name) / SPEC), Model, str(Path(name) / SPEC))
        return made
    if name in PRESETS:
        return preset(name)
    if name in shipped() or name.endswith(".toml"):
        return load_recipe(find(name)).model
    if not exists(name) and name not in PACKAGES and not name.startswith("hf:"):
        known = [*PRESETS, *shipped(), *PACKAGES]
        raise QkvError(f"{name!r} is no run, recipe, preset, file or name to pull{nearest(name, known)}")
    return described(opened(resolve(name)))


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the demo.")] = Path("runs/demo"),
    setting: Annotated[list[str] | None, typer.Option("--set", "-s", help="Change a field of the recipe.")] = None,
) -> None:
    """Train a small Transformer to pronounce English, in a few minutes, and look inside it."""
    from qkv.cli.demo import run

    run(out, setting or [], sys.stdout)


COMMANDS = [look, inspect, demo]
