import sys
import warnings
from math import ceil
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from matplotlib.font_manager import FontProperties, findfont
from PIL import Image

from qkv.errors import QkvError
from qkv.look import fonts, pictures

CHINESE = [*"我喜欢在图书馆学习", *"數學圖書館龍", "。", "</s>"]
ENGLISH = ["I", "like", "mathematics", "$x^2$ and $y$", " the", "\n"]


def random_weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(shape[-1]), size=shape[:-1])


def names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


def cover(families: list[str]) -> set[int]:
    """The characters that the families' files have, read with another library."""
    covered: set[int] = set()
    for family in families:
        covered |= set(TTFont(str(findfont(FontProperties(family=[family]))), fontNumber=0).getBestCmap())
    return covered


@pytest.mark.parametrize(
    "texts", [["cat"], ["我喜欢", "數學圖書館"], ["ひらがなカタカナ漢字"], ["ʃ θ ŋ", "Привет", "学x"]]
)
def test_every_character_has_a_glyph(texts):
    families = fonts.font_for(texts)
    assert families[0] == "DejaVu Sans"
    assert {ord(c) for text in texts for c in text if not c.isspace()} <= cover(families)


def test_plain_text_needs_one_font():
    assert fonts.font_for(["cat", "ʃ"]) == ["DejaVu Sans"]


def test_a_missing_glyph_is_one_sentence(monkeypatch):
    monkeypatch.setattr(fonts, "_families", lambda: iter(["DejaVu Sans"]))
    with pytest.warns(
        UserWarning, match=r"glyph for '學我' \(2 characters in all\).*pip install \"qkv\[look\]\""
    ) as found:
        assert fonts.font_for(["我學", "我"]) == ["DejaVu Sans"]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("token", "seen"),
    [("cat", "cat"), (" the", "␣the"), ("\n", "⏎"), ("a\tb", "a⇥b"), ("\x00", "�"), ("\u3000", "␣"), ("", "")],
)
def test_tokens_are_made_visible(token, seen):
    assert fonts.shown(token) == seen


@pytest.mark.parametrize("limit", [8, 9, 24])
def test_a_long_token_keeps_both_ends(limit):
    token = "abcdefghijklmnopqrstuvwxyz"
    seen = fonts.shown(token, limit)
    front, back = seen.split("…")
    assert len(seen) == limit and token.startswith(front) and token.endswith(back) and abs(len(front) - len(back)) <= 1


def test_chinese_is_drawn_without_a_missing_glyph(tmp_path):
    before = dict(matplotlib.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = random_weights(len(CHINESE), len(ENGLISH))
        pictures.attention_map(array, CHINESE, ENGLISH, title="跨注意力", path=tmp_path / "map.png")
        pictures.attention_grid(array.T[None], ENGLISH, CHINESE, titles=["頭一"], path=tmp_path / "grid.svg")
    assert dict(matplotlib.rcParams) == before


def test_the_map_shows_the_weights_and_the_tokens():
    array = random_weights(len(ENGLISH), len(CHINESE))
    figure = pictures.draw_attention_map(array, ENGLISH, CHINESE, title="one head")
    axes, bar = figure.axes
    assert np.allclose(axes.images[0].get_array(), array)
    assert axes.images[0].get_clim() == (0, 1)
    assert names(axes.yaxis) == ["I", "like", "mathematics", "$x^2$␣and␣$y$", "␣the", "⏎"]
    assert names(axes.xaxis) == CHINESE
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    assert axes.get_title(loc="left") == "one head"
    assert names(bar.yaxis) == ["0", "0.05", "0.25", "0.5", "1"]


@pytest.mark.parametrize("depth", [None, 1, 3])
def test_the_grid_names_tokens_at_its_edges_only(depth):
    shape = (2, 6, 13) if depth is None else (depth, 2, 6, 13)
    array = random_weights(*shape)
    tokens = [f"t{i}" for i in range(6)], [f"s{i}" for i in range(13)]
    figure = pictures.draw_attention_grid(array, *tokens)
    *maps, _ = figure.axes
    assert len(maps) == 2 * (depth or 1)
    for place, axes in enumerate(maps):
        layer, head = divmod(place, 2)
        assert np.allclose(axes.images[0].get_array(), array.reshape(-1, 6, 13)[place])
        assert names(axes.yaxis) == (tokens[0] if head == 0 else [])
        assert names(axes.xaxis) == (tokens[1] if layer == 0 else [])
        assert axes.get_xlabel() == ("" if depth is None else f"layer {layer + 1} · ") + f"head {head + 1}"


def test_cells_are_square_and_as_large_as_stated():
    figure = pictures.draw_attention_map(random_weights(3, 7), "abc", "abcdefg")
    box = figure.axes[0].get_window_extent()
    inches = box.width / figure.dpi, box.height / figure.dpi
    assert inches == pytest.approx((7 * pictures.CELL, 3 * pictures.CELL))


def test_a_long_sentence_stays_within_bounds():
    size = 300
    figure = pictures.draw_attention_map(np.full((size, size), 1 / size), *[[f"t{i}" for i in range(size)]] * 2)
    assert max(figure.get_size_inches()) <= pictures.WIDEST + 1
    every = ceil(pictures.LABEL / (pictures.WIDEST / size))
    assert names(figure.axes[0].xaxis) == [f"t{i}" for i in range(0, size, every)]
    assert every > 1


def test_shades_go_from_white_to_ink_in_even_steps():
    linear = [
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in matplotlib.colors.to_rgb(shade)]
        for shade in pictures.SHADES
    ]
    long, middle, short = np.cbrt(
        np.array(
            [[0.4122215, 0.5363325, 0.0514460], [0.2119035, 0.6806995, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
        )
        @ np.array(linear).T
    )
    lightness = 0.2104543 * long + 0.7936178 * middle - 0.0040720 * short
    assert lightness[0] == pytest.approx(1, abs=1e-3)
    assert np.allclose(np.diff(lightness), -0.75 / 8, atol=3e-3)


@pytest.mark.parametrize("kind", ["png", "svg", "PNG"])
def test_files_are_whole(tmp_path, kind):
    path = tmp_path / "new" / f"map.{kind}"
    assert pictures.attention_map(random_weights(2, 3), "ab", "cde", path=path) == path
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if kind == "svg":
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    else:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 100
        assert (pixels == 255).all(-1).any() and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("name", ["map.pdf", "map"])
def test_another_ending_is_refused_and_nothing_is_written(tmp_path, name):
    with pytest.raises(QkvError, match=r"expected \.png or \.svg"):
        pictures.attention_map(random_weights(2, 3), "ab", "cde", path=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_tensors_of_any_kind_are_taken():
    tensor = torch.softmax(torch.randn(2, 3, requires_grad=True), -1).bfloat16()
    array = pictures.attention_array(tensor, (2, 3))
    assert array.dtype == np.float64 and array.tolist() == tensor.tolist()


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        (np.ones((2, 2)), "found the shape 2 x 2, expected 2 x 3"),
        (np.ones(3), "found the shape 3, expected 2 x 3"),
        (np.full((2, 3), np.nan), "outside 0 … 1"),
        (np.full((2, 3), 1.5), "outside 0 … 1"),
        (np.full((2, 3), -0.5), "outside 0 … 1"),
    ],
)
def test_what_is_no_attention_is_refused(weights, fault):
    with pytest.raises(QkvError, match=fault):
        pictures.draw_attention_map(weights, "ab", "cde")


def test_no_tokens_and_a_wrong_number_of_titles_are_refused():
    with pytest.raises(QkvError, match="no tokens"):
        pictures.draw_attention_map(np.ones((0, 3)), "", "cde")
    with pytest.raises(QkvError, match="found 1 for 2 heads"):
        pictures.draw_attention_grid(random_weights(2, 2, 3), "ab", "cde", titles=["one"])


METRICS = [
    {"step": 10, "split": "train", "loss": 3.0, "lr": 1e-3, "tokens_per_second": 5, "seconds": 1.0},
    {"step": 20, "split": "train", "loss": 2.0, "lr": 1e-3, "grad_norm": 0.3, "seconds": 2.0},
    {"step": 20, "split": "valid", "loss": 2.5, "bleu": 11.0, "exact_match": 0.25, "note": "x", "seconds": 3.0},
    {"step": 40, "split": "valid", "loss": 1.5, "bleu": 21.3, "exact_match": 0.5, "seconds": 6.0},
]


def test_curves_are_read_by_metric_and_split():
    found = pictures.read_curves(METRICS)
    assert {name: list(splits) for name, splits in found.items()} == {
        "loss": ["train", "valid"],
        "bleu": ["valid"],
        "exact_match": ["valid"],
    }
    assert found["bleu"]["valid"].steps.tolist() == [20, 40] and found["bleu"]["valid"].values.tolist() == [11, 21.3]
    assert found["loss"]["train"].values.tolist() == [3, 2]


def test_curves_are_drawn_a_panel_each():
    figure = pictures.draw_curves(METRICS)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "bleu (valid)", "exact match (valid)"]
    raw, smooth, valid = figure.axes[0].lines
    assert raw.get_ydata().tolist() == smooth.get_ydata().tolist() == [3, 2]
    assert valid.get_xydata().tolist() == [[20, 2.5], [40, 1.5]]
    assert [text.get_text() for text in figure.axes[1].texts] == ["21.3"]


def test_curves_are_saved(tmp_path):
    assert pictures.curves(METRICS, path=tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(("metrics", "fault"), [([], "nothing to draw"), ([*METRICS, {"loss": 1.0}], "line 5.*'step'")])
def test_lines_without_curves_are_refused(metrics, fault):
    with pytest.raises(QkvError, match=fault):
        pictures.draw_curves(metrics)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_the_moving_average_is_a_mean_over_a_symmetric_window(count):
    values = np.random.default_rng(1).normal(size=count)
    if count > 5:
        values[3] = np.nan
    smooth = pictures.Curve(np.arange(count), values).smooth(share=0.2)
    for i in range(count):
        half = min(ceil(0.2 * count / 2), i, count - 1 - i)
        window = values[i - half : i + half + 1]
        expected = np.nan if np.isnan(window).all() else np.nanmean(window)
        assert smooth[i] == pytest.approx(expected, nan_ok=True)


def test_a_missing_library_names_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QkvError, match=r"need matplotlib.*pip install \"qkv\[look\]\""):
        pictures.draw_attention_map(random_weights(2, 3), "ab", "cde")


def test_paths_may_be_strings(tmp_path):
    assert pictures.attention_map([[1.0]], "a", "b", path=f"{tmp_path}/map.svg") == Path(tmp_path, "map.svg")
