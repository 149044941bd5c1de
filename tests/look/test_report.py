import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from qkv.errors import QkvError
from qkv.look import report as reports
from qkv.look.report import AttentionView, Report, Sample

VOID = {"meta", "input", "br", "hr", "img", "link"}
HOSTILE = ["<script>alert(1)</script>", '"onmouseover="alert(1)', "</td></table>", "&amp;", "{{ 7 * 7 }}"]


class Page(HTMLParser):
    """The page as a list of (tag, attributes, text inside), checked for balance while it is read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for place in self.open:
            self.elements[place][2].append(data)

    def texts(self, tag: str, **wanted: str) -> list[str]:
        return ["".join(t) for name, a, t in self.elements if name == tag and wanted.items() <= a.items()]


def view(heads: int, rows: list[str], columns: list[str]) -> AttentionView:
    weights = np.random.default_rng(0).dirichlet(np.full(len(columns), 0.3), size=(heads, len(rows)))
    return AttentionView("view", rows, columns, weights, [f"head {n + 1}" for n in range(heads)])


METRICS = [
    *(
        {"step": s, "split": "train", "loss": 4 * math.exp(-s / 900) + 0.1 * math.sin(s), "lr": 1e-3}
        for s in range(1, 2000)
    ),
    *(
        {"step": s, "split": "valid", "loss": 4 * math.exp(-s / 800), "error_rate": 1 / s}
        for s in range(250, 2000, 250)
    ),
]
FULL = Report(
    "Spelling to sound",
    summary=[("recipe", "spell.toml")],
    scores=[("words right", "67.5 %", "every sound is right")],
    metrics=METRICS,
    samples=[
        Sample("cat", "K AE T", ("K AE T",)),
        Sample("tomato", "T AH M EY T OW", ("T AH M AA T OW", "T AH M EY T OW")),
        Sample("colonel", "K AA L N AH L", ("K ER N AH L",)),
        Sample("学习", "", ("study",)),
        Sample("free", "anything"),
    ],
    attention=[view(3, ["K", "AE", "T"], [*"我喜欢學習"])],
)


def test_the_file_is_one_whole_balanced_page(tmp_path):
    path = reports.write(FULL, tmp_path / "new" / "report.html")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    text = path.read_text("utf-8")
    page = Page(text)
    assert text.startswith("<!doctype html>") and text.rstrip().endswith("</html>")
    assert page.texts("title")[:1] == page.texts("h1") == ["Spelling to sound"]
    assert page.texts("h2") == ["Scores", "Training", "Samples", "Attention"]


def test_the_page_loads_nothing():
    text = reports.render(FULL)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"src", "href", "srcset"} & {name for _, attributes, _ in Page(text).elements for name in attributes}


def test_what_is_empty_is_left_out():
    page = Page(reports.render(Report("only a title")))
    assert page.texts("h2") == [] and page.texts("h1") == ["only a title"]


def test_hostile_text_is_only_text():
    hostile = "".join(HOSTILE)
    harmless = Report(
        "t", [("a", "b")], [("a", "b", "c")], METRICS, [Sample("a", "b", ("c",))], [view(1, ["a"] * 5, ["b"] * 5)]
    )
    attack = Report(
        hostile,
        [(hostile, hostile)],
        [(hostile, hostile, hostile)],
        METRICS,
        [Sample(hostile, hostile, (hostile + "x",))],
        [AttentionView(hostile, HOSTILE, HOSTILE, np.eye(5)[None], [hostile])],
    )
    page, plain = Page(reports.render(attack)), Page(reports.render(harmless))
    assert len(page.texts("script")) == 1 and page.texts("script") == plain.texts("script")
    assert {n for _, a, _ in page.elements for n in a} == {n for _, a, _ in plain.elements for n in a}
    assert page.texts("h1") == page.texts("strong") == page.texts("h3") == page.texts("caption") == [hostile]
    assert page.texts("td", **{"data-of": "source"}) == page.texts("td", **{"data-of": "prediction"}) == [hostile]
    assert page.texts("th")[4:] == [reports.shown(token) for token in HOSTILE] * 2


def test_cells_hold_the_weights():
    shown = view(4, [f"t{i}" for i in range(6)], [f"s{i}" for i in range(9)])
    page = Page(reports.render(Report("t", attention=[shown])))
    cells = [(attributes.get("class"), "".join(text)) for tag, attributes, text in page.elements if tag == "td"]
    cells = [
        cell for number, cell in enumerate(cells) if number % (6 * 9 + 1)
    ]  # each table begins with its empty corner
    assert len(cells) == 4 * 6 * 9
    for (level, text), weight in zip(cells, np.asarray(shown.weights).flat, strict=True):
        assert int(text or 0) == round(100 * weight)
        shade = 0 if level is None else (1 + reports.LEVELS.index(level)) / len(reports.LEVELS)
        assert shade == pytest.approx(math.sqrt(weight), abs=0.5 / len(reports.LEVELS)) or (not text and shade == 0)


def test_thumbnails_hold_the_weights():
    shown = view(2, ["a"] * 5, ["b"] * 7)
    page = Page(reports.render(Report("t", attention=[shown])))
    drawn, inside = np.zeros((2, 5, 7)), -1
    for tag, attributes, _ in page.elements:
        inside += tag == "svg"
        if tag == "svg":
            assert attributes["viewbox"] == "0 -.5 7 5"
        if tag == "path":
            for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)", attributes["d"]):
                drawn[inside, int(y), int(x) : int(x) + int(length)] += int(attributes["class"][1:])
    assert np.array_equal(drawn, np.rint(5 * np.sqrt(shown.weights)))


def test_the_first_head_is_chosen_and_every_head_can_be():
    text = reports.render(FULL)
    radios = [
        attributes for tag, attributes, _ in Page(text).elements if tag == "input" and attributes["type"] == "radio"
    ]
    assert ["checked" in attributes for attributes in radios] == [True, False, False]
    assert len({attributes["name"] for attributes in radios}) == 1
    for n in (1, 2, 3):
        assert f".view:has(label:nth-child({n}) :checked) .map:nth-child({n})" in text


def test_wrong_predictions_are_marked():
    page = Page(reports.render(FULL))
    rows = [
        a["class"] for tag, a, _ in page.elements if tag == "tr" and a.get("class") in ("right", "wrong", "unjudged")
    ]
    assert rows == ["right", "right", "wrong", "wrong", "unjudged"]
    assert page.texts("mark") == ["AA L"]
    assert page.texts("u") == ["ER", "study"]
    assert any("2 of 4 predictions" in text for text in page.texts("p"))
    assert page.texts("label", **{"class": "only quiet"}) == [" only the 2 that differ"]


@pytest.mark.parametrize(
    ("prediction", "references"),
    [
        ("a b c", ("a x c", "q")),
        ("我爱你们", ("我喜欢你", "我爱他")),
        ("", ("a",)),
        ("a", ("",)),
        ("Hi, you!", ("Hi you",)),
    ],
)
def test_marked_pieces_are_the_whole_text(prediction, references):
    compared = reports._compared(Sample("s", prediction, references))
    assert "".join(piece.text for piece in compared.prediction) == prediction
    assert ["".join(piece.text for piece in pieces) for pieces in compared.references] == list(references)
    closest = [pieces for pieces in compared.references if any(piece.differs for piece in pieces)]
    same = [
        "".join(piece.text for piece in pieces if not piece.differs) for pieces in (compared.prediction, *closest[:1])
    ]
    assert len(set(same)) == 1  # what is not marked stands in both


def test_the_closest_reference_is_the_one_compared_with():
    compared = reports._compared(Sample("s", "a b c", ("x y z", "a b d", "a q r")))
    assert [[piece.text for piece in pieces if piece.differs] for pieces in compared.references] == [[], ["d"], []]
    assert [piece.text for piece in compared.prediction if piece.differs] == ["c"]


def test_the_train_split_is_smooth_over_its_faint_steps():
    train, valid = reports._panel("loss", reports.read_curves(METRICS)["loss"]).lines
    rough = [
        np.abs(np.diff([float(y) for y in re.findall(r" ([\d.]+)", path)], 2)).sum()
        for path in (train.faint, train.path)
    ]
    assert rough[0] > 5 * rough[1] and (train.dots, valid.faint) == ([], "")


def test_dots_stand_where_the_ticks_say():
    panel = reports._panel("loss", reports.read_curves(METRICS)["loss"])
    (x0, x1), (y0, y1) = (
        [(t.place, float(t.label)) for t in (ticks[0], ticks[-1])] for ticks in (panel.x_ticks, panel.y_ticks)
    )
    dots = panel.lines[1].dots
    assert len(dots) == 7
    for dot, line in zip(dots, METRICS[1999:], strict=True):
        step = x0[1] + (dot.x - x0[0]) * (x1[1] - x0[1]) / (x1[0] - x0[0])
        loss = y0[1] + (dot.y - y0[0]) * (y1[1] - y0[1]) / (y1[0] - y0[0])
        assert step == pytest.approx(line["step"], abs=10) and loss == pytest.approx(line["loss"], abs=0.03)
        assert (dot.step, float(dot.value)) == (str(line["step"]), pytest.approx(line["loss"], rel=1e-3))


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.1283, 0.5217), (-3, 40), (9.999, 10.001), (1e-7, 3e-7), (50, 123456)]
)
@pytest.mark.parametrize("most", [4, 5])
def test_ticks_are_round_and_inside(low, high, most):
    ticks = [float(tick.label) for tick in reports._Scale(low, high, 0, 1).ticks(most)]
    steps = np.diff(ticks)
    assert low <= ticks[0] + 1e-9 and ticks[-1] <= high + 1e-9 and 2 <= len(ticks) <= most + 1
    assert np.allclose(steps, steps[0], rtol=1e-2)
    assert f"{steps[0]:.0e}"[0] in "125"


@pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [math.nan, 1.0, math.inf], [math.nan], [0.0, 0.0]])
def test_short_flat_and_broken_curves_are_drawn(values):
    metrics = [
        {"step": 10 * n, "split": split, "loss": v} for n, v in enumerate(values) for split in ("train", "valid")
    ]
    page = Page(reports.render(Report("t", metrics=metrics)))
    places = [
        float(n)
        for tag, a, _ in page.elements
        if tag in ("path", "circle")
        for n in re.findall(r"[\d.]+", f"{a.get('d', '')} {a.get('cx', '')}")
    ]
    assert all(0 <= place <= reports.WIDTH for place in places)
    assert len(page.texts("circle")) == sum(map(math.isfinite, values))


def test_a_long_run_stays_small():
    panel = reports._panel("loss", reports.read_curves(METRICS)["loss"])
    assert 200 < panel.lines[0].faint.count("L") < 250 < sum(line["split"] == "train" for line in METRICS)


def test_eight_sentences_of_a_small_model_stay_below_500_kilobytes():
    tokens = [f"t{i}" for i in range(12)]
    text = reports.render(Report("t", attention=[view(12, tokens, tokens)] * 8))
    assert len(text.encode()) < 500_000


def test_weights_of_another_shape_are_refused_and_nothing_is_written(tmp_path):
    wrong = AttentionView("cat", ["K"], ["c"], np.ones((2, 1, 2)) / 2, ["one", "two"])
    with pytest.raises(QkvError, match="attention view 'cat': found the shape 2 x 1 x 2, expected 2 x 1 x 1"):
        reports.write(Report("t", attention=[wrong]), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(QkvError, match=r"need jinja2.*pip install \"qkv\[look\]\""):
        reports.render(FULL)
