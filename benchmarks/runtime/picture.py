"""A table of figures as a picture: of each work the rates of qkv and of every other engine, each in its fastest form.

    python -m benchmarks.runtime.picture benchmarks/results/2026-11-22.csv docs/speed.svg

Its background is transparent and its text mid-grey, for pages that are light and dark.
"""

import argparse
import csv
import dataclasses as dc
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, OTHERS, TEXT = "#4f8acf", "#9aa1ab", "#7a828e"
WIDTH, BAR, LINE, GAP = 8.0, 0.2, 0.14, 0.2
"""Inches: of the picture, and in it the height of a bar, of a line of text, and of what stands between two works."""
LETTERS = 57
"""Of a line."""


@dc.dataclass(frozen=True)
class Bar:
    """The fastest form of one engine."""

    form: str
    rate: float

    @property
    def ours(self) -> bool:
        return engine(self.form) == "qkv"


@dc.dataclass(frozen=True)
class Panel:
    """One work: bars, the fastest first, and by how much ours is faster than the fastest other."""

    work: str
    unit: str
    bars: list[Bar]
    ratio: float

    @property
    def title(self) -> list[str]:
        return wrap(f"{self.work}, {self.unit}", LETTERS)

    @property
    def height(self) -> float:
        return GAP + LINE * len(self.title) + BAR * len(self.bars)


def engine(form: str) -> str:
    return form.split()[0]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of each work as it was measured last."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    last = {row["work"]: row["date"] for row in rows}
    return [row for row in rows if row["date"] == last[row["work"]]]


def panels(rows: list[dict[str, str]]) -> list[Panel]:
    """Every work that has a rate, in the order of the table."""
    found = []
    for work in dict.fromkeys(row["work"] for row in rows):
        figures = {(row["form"], row["unit"]): float(row["median"]) for row in rows if row["work"] == work}
        best: dict[str, Bar] = {}
        for (form, unit), rate in figures.items():
            if unit.endswith("/s") and not unit.startswith("×"):
                best[engine(form)] = max(
                    best.get(engine(form), Bar(form, 0)), Bar(form, rate), key=lambda one: one.rate
                )
        bars = sorted(best.values(), key=lambda one: -one.rate)
        units = [unit for _, unit in figures if unit.endswith("/s")]
        ours, others = [one for one in bars if one.ours], [one for one in bars if not one.ours]
        if ours and others:
            ratio = figures[f"{ours[0].form} ÷ {others[0].form}", f"× {units[0]}"]
            found.append(Panel(work, units[0], bars, ratio))
    return found


def columns(every: list[Panel]) -> list[list[Panel]]:
    """The panels in two columns of like height, in order."""
    cut = min(range(1, len(every) + 1), key=lambda n: max(total(every[:n]), total(every[n:])))
    return [every[:cut], every[cut:]]


def total(some: list[Panel]) -> float:
    return sum(panel.height for panel in some)


def draw(rows: list[dict[str, str]]) -> "Figure":
    from matplotlib.figure import Figure

    both = columns(panels(rows))
    height = max(map(total, both)) + BAR
    figure = Figure(figsize=(WIDTH, height))
    for column, some in enumerate(both):
        top = height
        for panel in some:
            top -= panel.height
            place = (0.005 + column * 0.51, top / height, 0.485, BAR * len(panel.bars) / height)
            fill(figure.add_axes(place), panel)
    one = rows[0]
    note = f"{one['machine']}, {one['threads']} threads, {one['date'][:10]}; × is against the fastest other engine"
    figure.text(0.005, 0.03 / height, note, color=TEXT, fontsize=7.5)
    return figure


def fill(axes: "Axes", panel: Panel) -> None:
    axes.set_axis_off()
    axes.set_xlim(-0.61, 1.56)
    axes.set_ylim(len(panel.bars) - 0.5, -0.5)
    most = max(one.rate for one in panel.bars)
    axes.text(-0.61, -0.7, "\n".join(panel.title), color=TEXT, fontsize=8, fontweight="bold")
    for n, one in enumerate(panel.bars):
        axes.barh(n, one.rate / most, height=0.72, color=OURS if one.ours else OTHERS)
        weight = "bold" if one.ours else "normal"
        said = f"{one.rate:,.0f}" + (f" · {panel.ratio:.2f} ×" if one.ours else "")
        for x, text, side in ((-0.02, one.form, "right"), (one.rate / most + 0.02, said, "left")):
            axes.text(x, n, text, color=TEXT, fontsize=8, fontweight=weight, ha=side, va="center")


def main() -> None:
    import matplotlib

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="as `python -m benchmarks.runtime --csv` writes it")
    parser.add_argument("picture", type=Path, help="a file that ends in .svg or .png")
    options = parser.parse_args()
    # The same table is the same file; text stays text, a tenth of the size of its outlines.
    matplotlib.rcParams |= {"svg.hashsalt": "qkv", "svg.fonttype": "none"}
    metadata = {"Date": None} if options.picture.suffix == ".svg" else {}
    draw(read(options.table)).savefig(options.picture, transparent=True, dpi=200, metadata=metadata)


if __name__ == "__main__":
    main()
