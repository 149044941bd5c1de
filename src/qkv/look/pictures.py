"""Pictures as files: one head's attention, all heads in a grid, the curves of a run.

Each picture has two functions: `draw_…` returns the matplotlib figure, the other saves it as PNG or SVG.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from qkv.checkpoints.whole import write_bytes
from qkv.errors import QkvError
from qkv.look.fonts import font_for, require, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

Weights = torch.Tensor | NDArray[Any] | Sequence[Any]
Floats = NDArray[np.float64]

# equal steps of lightness in OKLab, from paper white through blue to ink
SHADES = ("#ffffff", "#d0e3f1", "#a1c7e6", "#74a9dd", "#4f8acf", "#396bb6", "#2c4e94", "#23356a", "#191f3c")
INK, QUIET = "#22262e", "#6b7280"
TRAIN, OTHERS = "#396bb6", ("#c2571a", "#3f7d58", "#8a4fa3")  # curves: the train split, and the others in turn
CELL = 0.26  # inches per token of one map; a grid of maps is a third smaller
GAP = 0.36  # inches between two maps, with room for a title
WIDEST = 24.0  # inches that the cells of a picture take at most: longer sentences get smaller cells
MEASURE = "attention weight"
LABEL = 0.11  # inches between labels below which only every second, third, … token is named
_NOT_A_METRIC = {"step", "split", "lr", "seconds", "tokens_per_second"}


@dataclass(frozen=True)
class Curve:
    """One metric of one split over the steps of a run."""

    steps: Floats
    values: Floats

    def smooth(self, share: float = 0.05) -> Floats:
        """Moving average over `share` of the points; the window is symmetric, so the curve does not lag behind, and
        narrows towards both ends. Points that are not finite are left out."""
        finite = np.isfinite(self.values)
        sums = np.concatenate(([0], np.where(finite, self.values, 0).cumsum()))
        counts = np.concatenate(([0], finite.cumsum()))
        place = np.arange(len(self.values))
        half = np.minimum(ceil(share * len(place) / 2), np.minimum(place, place[::-1]))
        low, high = place - half, place + half + 1
        with np.errstate(invalid="ignore"):
            return (sums[high] - sums[low]) / (counts[high] - counts[low])


@dataclass
class _Columns:
    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


def read_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Curve]]:
    """The lines of a run's `metrics.jsonl` as curves: metric → split → curve, the loss first.

    Of the train split only the loss is a metric; of every other split each number that is no count of time or rate.
    """
    found: dict[str, dict[str, _Columns]] = {"loss": {}}
    for number, line in enumerate(metrics, 1):
        if "step" not in line or "split" not in line:
            raise QkvError(f"metrics, line {number}: found the keys {sorted(line)}, expected 'step' and 'split' too")
        for name, value in line.items():
            if name in _NOT_A_METRIC or not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if name == "loss" or line["split"] != "train":
                columns = found.setdefault(name, {}).setdefault(line["split"], _Columns())
                columns.steps.append(line["step"])
                columns.values.append(value)
    return {
        name: {split: Curve(np.array(c.steps, float), np.array(c.values, float)) for split, c in splits.items()}
        for name, splits in found.items()
        if splits
    }


def panel_title(name: str, splits: Collection[str]) -> str:
    """A metric's name in words, with the split where there is only one."""
    return name.replace("_", " ") + (f" ({next(iter(splits))})" if len(splits) == 1 else "")


def attention_array(weights: Weights, shape: Sequence[int | None], what: str = "weights") -> Floats:
    """`weights` as an array in memory, of this shape (None: any size); each is a share between 0 and 1."""
    array = np.asarray(weights.detach().double().cpu() if isinstance(weights, torch.Tensor) else weights, float)
    if len(shape) != array.ndim or any(want not in (None, size) for want, size in zip(shape, array.shape, strict=True)):
        wanted = " x ".join("any" if want is None else str(want) for want in shape)
        found = " x ".join(map(str, array.shape))
        raise QkvError(f"{what}: found the shape {found}, expected {wanted}, as many as there are tokens")
    if not array.size:
        raise QkvError(f"{what}: found no tokens or no heads, expected at least one of each")
    if not (np.isfinite(array).all() and array.min() >= -1e-6 and array.max() <= 1 + 1e-3):
        raise QkvError(f"{what}: found values outside 0 … 1, expected attention weights, taken after the softmax")
    return array.clip(0, 1)


def attention_map(
    weights: Weights,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    measure: str = MEASURE,
    path: Path,
) -> Path:
    """Save one head's weights (T S) as a heat map: a row is a token that looks, a column one it looks at.

    The caption of the colours says what is measured.
    """
    return save(draw_attention_map(weights, rows, columns, title=title, measure=measure), path)


def attention_grid(
    weights: Weights,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    measure: str = MEASURE,
    path: Path,
) -> Path:
    """Save the weights of many heads (L H T S, or H T S) as a grid of small maps, one row of the grid per layer."""
    return save(draw_attention_grid(weights, rows, columns, titles=titles, measure=measure), path)


def curves(metrics: Sequence[Mapping[str, Any]], *, path: Path) -> Path:
    """Save the curves of a run from the lines of its `metrics.jsonl`."""
    return save(draw_curves(metrics), path)


def draw_attention_map(
    weights: Weights, rows: Sequence[str], columns: Sequence[str], *, title: str = "", measure: str = MEASURE
) -> "Figure":
    """The figure that `attention_map` saves."""
    array = attention_array(weights, (len(rows), len(columns)))
    figure = _draw_maps(array[None, None], rows, columns, CELL, measure)
    figure.axes[0].set_title(title, loc="left", fontsize=11, pad=10, **as_text(title))
    return figure


def draw_attention_grid(
    weights: Weights,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    measure: str = MEASURE,
) -> "Figure":
    """The figure that `attention_grid` saves; `titles` name the heads in reading order."""
    layers = [None] if np.ndim(weights) == 4 else []
    array = attention_array(weights, (*layers, None, len(rows), len(columns)))
    array = array.reshape(-1, *array.shape[-3:])
    depth, heads = array.shape[:2]
    if titles is None:
        of_layer = [f"layer {n + 1} · " if layers else "" for n in range(depth)]
        titles = [f"{layer}head {n + 1}" for layer in of_layer for n in range(heads)]
    if len(titles) != depth * heads:
        raise QkvError(f"titles: found {len(titles)} for {depth * heads} heads, expected one for each")
    figure = _draw_maps(array, rows, columns, CELL * 2 / 3, measure)
    for axes, title in zip(figure.axes, titles, strict=False):  # after the maps comes the colour bar
        axes.set_xlabel(title, fontsize=9, labelpad=6, **as_text(title))
    return figure


def draw_curves(metrics: Sequence[Mapping[str, Any]]) -> "Figure":
    """The figure that `curves` saves: the loss (each train step faintly, its moving average, and the other splits'
    points), then one panel per further metric of the other splits."""
    require("matplotlib")
    from matplotlib.figure import Figure

    panels = read_curves(metrics)
    if not panels:
        raise QkvError("metrics: found no loss and no other metric in its lines, so there is nothing to draw")
    across = min(3, len(panels))
    down = ceil(len(panels) / across)
    figure = Figure(figsize=(4.4 * across, 3.1 * down), layout="constrained", facecolor="white")
    for place, (name, splits) in enumerate(panels.items(), 1):
        _draw_panel(figure.add_subplot(down, across, place), name, splits)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Write the figure as PNG or SVG, whichever the path ends in; the file appears whole or not at all."""
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise QkvError(f"{path}: found the ending {path.suffix!r}, expected .png or .svg")
    buffer = BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, bbox_inches="tight", pad_inches=0.12)
    return write_bytes(path, buffer.getvalue())


def _draw_maps(array: Floats, rows: Sequence[str], columns: Sequence[str], cell: float, measure: str) -> "Figure":
    """A grid of maps (L H T S) under one colour bar; tokens are named at the left and the upper edge only."""
    require("matplotlib")
    from matplotlib.figure import Figure

    depth, heads, tall, wide = array.shape
    cell = min(cell, WIDEST / (heads * wide), WIDEST / (depth * tall))
    width, height = wide * cell, tall * cell
    right, top = heads * (width + GAP), depth * (height + GAP) - GAP
    # placed by hand, in inches: every cell has its size, and saving widens the figure by whatever the labels take
    figure = Figure(figsize=(right, top), facecolor="white")
    look: dict[str, Any] = {"cmap": colours(), "norm": square_root(), "interpolation": "nearest"}
    for layer, head in np.ndindex(depth, heads):
        corner = head * (width + GAP), top - layer * (height + GAP) - height
        axes = figure.add_axes((corner[0] / right, corner[1] / top, width / right, height / top))
        picture = axes.imshow(array[layer, head], **look)
        axes.tick_params(length=0, pad=3)
        axes.spines[:].set(color="#d5d9e0", linewidth=0.8)
        name_rows(axes, rows if head == 0 else (), cell)
        name_columns(axes, columns if layer == 0 else (), cell)
    long = max(1.4, min(2.2, top))
    bar = figure.colorbar(picture, cax=figure.add_axes((1, (top - long) / 2 / top, 0.12 / right, long / top)))
    bar.set_ticks([0, 0.05, 0.25, 0.5, 1], labels=["0", "0.05", "0.25", "0.5", "1"], fontsize=8, color=QUIET)
    bar.set_label(f"{measure}\n(square-root scale)", fontsize=8, color=QUIET, parse_math=False)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def name_rows(axes: "Axes", tokens: Sequence[str], cell: float) -> None:
    every = ceil(LABEL / cell)
    labels = [shown(token) for token in tokens][::every]
    axes.set_yticks(range(0, len(tokens), every), labels, fontsize=_size(cell * every))
    for label in axes.get_yticklabels():
        label.set(**as_text(label.get_text()))


def name_columns(axes: "Axes", tokens: Sequence[str], cell: float) -> None:
    """Names above the columns: slanted where long, all of them where most are."""
    every = ceil(LABEL / cell)
    labels = [shown(token) for token in tokens][::every]
    axes.xaxis.tick_top()
    axes.set_xticks(range(0, len(tokens), every), labels, fontsize=_size(cell * every))
    mostly_long = sum(len(label) > 2 for label in labels) > len(labels) / 2
    for label in axes.get_xticklabels():
        label.set(**as_text(label.get_text()))
        if mostly_long or len(label.get_text()) > 2:
            label.set(rotation=50, ha="left", rotation_mode="anchor")


def _size(inches: float) -> float:
    """The font size in points for labels that have so many inches each."""
    return min(10.0, 72 * inches * 0.75)


def as_text(text: str) -> dict[str, Any]:
    """Settings of a label that shows foreign text as it is: fonts that have it, and dollar signs are no formula."""
    return {"family": font_for([text]), "parse_math": False, "color": INK}


def colours() -> "Colormap":
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("paper to ink", SHADES)


def square_root() -> "Normalize":
    """0 … 1 in every picture, so that heads and pictures compare; the root keeps the 1/S of a long sentence visible."""
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, vmin=0, vmax=1)


AVERAGE = "train, moving average"


def worded(value: float) -> str:
    """A number in three digits, or as many as stand before its point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _draw_panel(axes: "Axes", name: str, splits: Mapping[str, Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = cycle(OTHERS)
    for split, curve in splits.items():
        if split == "train":
            axes.plot(curve.steps, curve.values, color=TRAIN, alpha=0.25, linewidth=0.8)
            alone = "o" if len(curve.steps) == 1 else None  # a line of one point would not be seen
            axes.plot(curve.steps, curve.smooth(), color=TRAIN, linewidth=1.8, marker=alone, label=AVERAGE)
        else:
            colour = next(colours)
            axes.plot(curve.steps, curve.values, color=colour, linewidth=1.4, marker="o", markersize=4, label=split)
            last, place = worded(curve.values[-1]), (curve.steps[-1], curve.values[-1])
            axes.annotate(last, place, (7, 0), textcoords="offset points", va="center", fontsize=9, color=colour)
    title = panel_title(name, splits)
    axes.set_title(title, loc="left", fontsize=11, **as_text(title))
    axes.set_xlabel("step", fontsize=9, color=QUIET)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if len(splits) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8, labelcolor=QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced6")
