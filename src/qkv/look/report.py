"""A run's report: one HTML file with its scores, curves, samples and attention, to show to someone.

It opens without a network and without JavaScript; `report.html` beside this file is its template.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import cycle
from math import ceil, floor, log10, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from qkv.checkpoints.whole import write_bytes
from qkv.look.fonts import require, shown
from qkv.look.pictures import Curve, Floats, Weights, attention_array, panel_title, read_curves

LEVELS = "abcdefghijklmnopqrst"  # classes of a cell: equal steps of the square root of its weight
MOST_POINTS = 240  # of one curve: more are not seen at the width of a page
WIDTH, HEIGHT = 320, 190  # of a panel of curves
LEFT, RIGHT, UPPER, LOWER = 34, 316, 14, 166  # its inside


@dataclass(frozen=True)
class Sample:
    """What the model made of one source; with no references it is neither right nor wrong."""

    source: str
    prediction: str
    references: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """Whether the prediction is one of the references."""
        return self.prediction in self.references


@dataclass(frozen=True)
class AttentionView:
    """The weights (H T S) of some heads over one example: rows are the T tokens that look, columns the S looked at."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    weights: Weights
    heads: Sequence[str]


@dataclass(frozen=True)
class Report:
    """All that a report shows; what is empty is left out.

    `summary` holds (label, value), `scores` (name, value, what it means), `metrics` the lines of `metrics.jsonl`.
    """

    title: str
    summary: Sequence[tuple[str, str]] = ()
    scores: Sequence[tuple[str, str, str]] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sample] = ()
    attention: Sequence[AttentionView] = ()


def write(report: Report, path: Path) -> Path:
    """Write the report as one HTML file, whole or not at all."""
    return write_bytes(Path(path), render(report).encode())


def render(report: Report) -> str:
    """The report's HTML."""
    require("jinja2")
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(Path(__file__).with_name("report.html").read_text("utf-8"))
    views = [_view(view) for view in report.attention]
    return template.render(
        report=report,
        panels=[_panel(name, splits) for name, splits in read_curves(report.metrics).items()],
        samples=[_compared(sample) for sample in report.samples],
        wrong=sum(not sample.right for sample in report.samples if sample.references),
        judged=sum(bool(sample.references) for sample in report.samples),
        views=views,
        most_heads=max((len(view.heads) for view in views), default=0),
        levels=LEVELS,
        frame={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "upper": UPPER, "lower": LOWER},
    )


# Samples ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    text: str
    differs: bool


@dataclass(frozen=True)
class _Compared:
    sample: Sample
    prediction: list[_Piece]
    references: list[list[_Piece]]


def _compared(sample: Sample) -> _Compared:
    """The prediction beside its references: it is marked where it differs from the closest, and that one likewise."""
    plain = [[_Piece(reference, False)] for reference in sample.references]
    if sample.right or not sample.references:
        return _Compared(sample, [_Piece(sample.prediction, False)], plain)
    words = _words(sample.prediction)
    alignments = [SequenceMatcher(None, words, _words(reference), autojunk=False) for reference in sample.references]
    closest = max(range(len(alignments)), key=lambda i: alignments[i].ratio())
    operations = alignments[closest].get_opcodes()
    theirs = _words(sample.references[closest])
    plain[closest] = [_Piece("".join(theirs[low:high]), tag != "equal") for tag, _, _, low, high in operations]
    mine = [_Piece("".join(words[low:high]), tag != "equal") for tag, low, high, _, _ in operations]
    return _Compared(sample, mine, plain)


def _words(text: str) -> list[str]:
    """The units of a comparison: words, signs and spaces; the characters of a text that has no spaces."""
    return re.findall(r"\s+|\w+|[^\w\s]", text) if " " in text.strip() else list(text)


# Attention ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    level: str
    percent: str


@dataclass(frozen=True)
class _Head:
    title: str
    lines: list[list[_Cell]]
    strokes: dict[int, str]


@dataclass(frozen=True)
class _View:
    title: str
    rows: list[str]
    columns: list[str]
    heads: list[_Head]
    upright: bool


def _view(view: AttentionView) -> _View:
    shape = (len(view.heads), len(view.rows), len(view.columns))
    weights = attention_array(view.weights, shape, f"attention view {view.title!r}")
    columns = [shown(token) for token in view.columns]
    upright = max(map(len, columns)) <= (5 if len(columns) <= 16 else 2)
    heads = [_head(title, array) for title, array in zip(view.heads, weights, strict=True)]
    return _View(view.title, [shown(token) for token in view.rows], columns, heads, upright)


def _head(title: str, weights: Floats) -> _Head:
    return _Head(title, [[_cell(weight) for weight in row] for row in weights.tolist()], _strokes(weights))


def _cell(weight: float) -> _Cell:
    """The class that shades a cell, and its weight per cent; both empty below half a per cent."""
    percent = round(100 * weight)
    return _Cell(LEVELS[round(sqrt(weight) * len(LEVELS)) - 1], str(percent)) if percent else _Cell("", "")


def _strokes(weights: Floats, levels: int = 5) -> dict[int, str]:
    """A head in small: for each level of shade the path of its cells, neighbours in a row drawn as one line."""
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(np.rint(np.sqrt(weights) * levels).astype(int).tolist()):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                if row[start]:
                    paths.setdefault(row[start], []).append(f"M{start} {y}h{x - start}")
                start = x
    return {level: "".join(parts) for level, parts in sorted(paths.items())}


# Curves -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tick:
    place: float
    label: str


@dataclass(frozen=True)
class _Dot:
    x: float
    y: float
    step: str
    value: str


@dataclass(frozen=True)
class _Line:
    split: str
    colour: int
    path: str
    faint: str
    dots: list[_Dot]


@dataclass(frozen=True)
class _Panel:
    title: str
    x_ticks: list[_Tick]
    y_ticks: list[_Tick]
    lines: list[_Line]


@dataclass(frozen=True)
class _Scale:
    """Values from low to high, laid out from start to end."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self, most: int) -> list[_Tick]:
        """At multiples of 1, 2 or 5 times a power of ten."""
        rough = (self.high - self.low) / most
        power = 10.0 ** floor(log10(rough))
        step = next(power * multiple for multiple in (1, 2, 5, 10) if power * multiple >= rough * 0.999)
        numbers = range(ceil(self.low / step), floor(self.high / step) + 1)
        return [_Tick(self.place(number * step), f"{number * step:.6g}") for number in numbers]


def _panel(name: str, splits: Mapping[str, Curve]) -> _Panel:
    steps, values = (
        np.concatenate(parts) for parts in zip(*((c.steps, c.values) for c in splits.values()), strict=True)
    )
    x, y = _scale(steps, LEFT + 6, RIGHT - 6), _scale(values[np.isfinite(values)], LOWER - 6, UPPER + 6)
    others = cycle((2, 3))
    lines = [_line(split, curve, 1 if split == "train" else next(others), x, y) for split, curve in splits.items()]
    return _Panel(panel_title(name, splits), x.ticks(4), y.ticks(5), lines)


def _scale(values: Floats, start: float, end: float) -> _Scale:
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    spare = 0.0 if high > low else max(abs(low), 1.0) / 2
    return _Scale(low - spare, high + spare, start, end)


def _line(split: str, curve: Curve, colour: int, x: _Scale, y: _Scale) -> _Line:
    """The train split as a moving average over its faint steps, any other as points."""
    if split == "train":
        smooth = Curve(curve.steps, curve.smooth())
        return _Line("train, averaged", colour, _path(smooth, x, y), _path(curve, x, y), [])
    points = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
    dots = [_Dot(x.place(s), y.place(v), f"{s:.6g}", f"{v:.4g}") for s, v in points if np.isfinite(v)]
    return _Line(split, colour, _path(curve, x, y), "", dots)


def _path(curve: Curve, x: _Scale, y: _Scale) -> str:
    known = np.flatnonzero(np.isfinite(curve.values))
    kept = known[np.unique(np.linspace(0, len(known) - 1, min(len(known), MOST_POINTS)).astype(int))]
    points = zip(curve.steps[kept].tolist(), curve.values[kept].tolist(), strict=True)
    return "M" + "L".join(f"{x.place(step)} {y.place(value)}" for step, value in points) if kept.size else ""
