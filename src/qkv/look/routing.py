"""Where the tokens of one text go: which experts read each of them, and how much each expert has to read."""

import dataclasses as dc
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.errors import QkvError
from qkv.look.attention import watch
from qkv.look.fonts import require
from qkv.look.pictures import (
    CELL,
    GAP,
    INK,
    QUIET,
    TRAIN,
    WIDEST,
    as_text,
    colours,
    name_columns,
    name_rows,
    save,
    square_root,
)
from qkv.use import Prediction, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOAD = 1.3  # inches of the bars that show loads


@dc.dataclass(frozen=True)
class Routing:
    """Where the tokens of one text went, in all layers of a stack that have experts."""

    kind: str
    """`stack`, or `encoder` and `decoder`."""
    tokens: list[str]
    layers: list[str]
    """The path of each layer's branch, such as `stack.0.ffn`."""
    gates: list[Tensor]
    """E T of each layer: the share of each expert in what a token gets, 0 where it is not sent."""
    loads: list[Tensor]
    """E of each layer: the share of all choices that fell on each expert."""


def route(task: Task, text: str, answer: Prediction | None = None) -> list[Routing]:
    """Where a model sends the tokens of a text, and of the answer that it gave; of each stack with experts."""
    tap = Tap("**.experts", "**.gates", "**.scores")
    seen = watch(task, text, answer, tap)
    found: list[Routing] = []
    for kind, tokens in (("stack", seen.source), ("encoder", seen.source), ("decoder", seen.fed)):
        layers = [path.removesuffix(".experts") for path in tap.find(f"{kind}.**.experts")]
        of_each = [[tap[f"{layer}.{name}"][0] for name in ("experts", "gates", "scores")] for layer in layers]
        if layers:
            loads = [experts.flatten().bincount(minlength=scores.shape[1]) for experts, _, scores in of_each]
            gates = [shares(*values) for values in of_each]
            found.append(Routing(kind, tokens, layers, gates, [(load / load.sum()).cpu() for load in loads]))
    return found


def shares(experts: Tensor, gates: Tensor, scores: Tensor) -> Tensor:
    """Experts and gates (T k), of as many as there are scores (T E) → E T."""
    sums = torch.zeros_like(scores, dtype=torch.float64).scatter_add(1, experts, gates.double())
    return (sums / sums.sum(1, keepdim=True)).t().cpu()


def routing_map(routing: Routing, *, path: Path) -> Path:
    """Save a picture of a routing: for each layer a map of experts by tokens, and beside it each expert's load."""
    return save(draw_routing(routing), path)


def draw_routing(routing: Routing) -> "Figure":
    """The figure that `routing_map` saves."""
    if not routing.tokens:
        raise QkvError("routing: found no tokens, expected at least one")
    require("matplotlib")
    from matplotlib.figure import Figure

    counts = [len(gates) for gates in routing.gates]
    across, down = min(CELL, WIDEST / len(routing.tokens)), min(CELL, WIDEST / sum(counts))
    wide = max(1.0, across * len(routing.tokens))
    right, top = wide + GAP / 2 + LOAD, down * sum(counts) + GAP * (len(counts) - 1)
    # placed by hand, in inches, as the maps of attention are
    figure = Figure(figsize=(right, top), facecolor="white")
    corner = top
    for n, (layer, gates, load) in enumerate(zip(routing.layers, routing.gates, routing.loads, strict=True)):
        tall = down * len(gates)
        corner -= tall + (GAP if n else 0)
        place = (corner / top, tall / top)
        axes = figure.add_axes((0, place[0], wide / right, place[1]))
        look: dict[str, Any] = {"cmap": colours(), "norm": square_root(), "interpolation": "nearest", "aspect": "auto"}
        picture = axes.imshow(gates.numpy(), **look)
        axes.tick_params(length=0, pad=3)
        axes.spines[:].set(color="#d5d9e0", linewidth=0.8)
        name_rows(axes, [str(e + 1) for e in range(len(gates))], down)
        name_columns(axes, routing.tokens if n == 0 else (), across)
        axes.set_ylabel(layer, fontsize=9, labelpad=6, **as_text(layer))
        bars = figure.add_axes(((wide + GAP / 2) / right, place[0], LOAD / right, place[1]), sharey=axes)
        draw_load(bars, load, most=max(float(load.max()) for load in routing.loads), titled=n == 0)
    long = min(2.0, top)
    bar = figure.colorbar(picture, cax=figure.add_axes((1.03, 1 - long / top, 0.12 / right, long / top)))
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1], labels=["0", "0.05", "0.25", "0.5", "1"], fontsize=8, color=QUIET)
    bar.set_label("share of the token's gates\n(square-root scale)", fontsize=8, color=QUIET)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def draw_load(axes: "Axes", load: Tensor, *, most: float, titled: bool) -> None:
    """A bar for each expert, and a line where all would be even."""
    axes.barh(range(len(load)), load.numpy(), height=0.7, color=TRAIN)
    axes.axvline(1 / len(load), color=INK, linewidth=0.8, linestyle=(0, (3, 2)))
    end = 1.4 * max(most, 1 / len(load))  # room for the numbers
    axes.set_xlim(0, end)
    for expert in range(0, len(load), ceil(len(load) / 16)):
        axes.text(end, expert, f"{load[expert]:.0%}", fontsize=7, ha="right", va="center", color=QUIET)
    axes.tick_params(length=0, labelleft=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    if titled:
        axes.set_title("load; dashed: even", fontsize=8, color=QUIET, loc="left")
