"""Pictures of what memories read: the shares that the tap's signed weights make, beside attention's own."""

import pytest
import torch
from PIL import Image
from tests.contracts.specs import rough
from tests.train.small import small_run

from qkv.cli.look import draw
from qkv.context import Tap
from qkv.errors import QkvError
from qkv.look import attend
from qkv.look.attention import shares, watch
from qkv.look.pictures import draw_attention_grid
from qkv.parts import GLA, Retention
from qkv.spec import edit
from qkv.train import Task

TEXT = "abcde"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Two layers each: retention reads the source, GLA and attention write."""
    run = small_run(tmp_path_factory.mktemp("memories"))
    spec = edit(edit(run.recipe.model, "encoder.depth", 2), "decoder.depth", 2)
    spec = edit(edit(spec, "encoder.**.attn.f", Retention(2)), "decoder.1.attn.f", GLA(4))
    return Task(rough(spec).float(), run.tokenizers)


@torch.no_grad()
def test_shares_are_of_what_is_read_without_its_sign(task):
    answer, tap = task.predict([TEXT])[0][0], Tap("**.weights")
    watch(task, TEXT, answer, tap)
    views = {one.kind: one for one in attend(task, TEXT, answer)}
    assert list(views) == ["encoder-memory", "cross", "decoder", "decoder-memory"]
    assert views["encoder-memory"].layers == ["encoder.0.attn", "encoder.1.attn"]
    assert (views["decoder"].layers, views["decoder-memory"].layers) == (["decoder.0.attn"], ["decoder.1.attn"])
    assert (views["decoder"].numbers, views["decoder-memory"].numbers) == ([1], [2])
    for kind in ("encoder-memory", "decoder-memory"):
        one = views[kind]
        assert one.measure == "|weight| / Σ |weight|"
        for layer, path in enumerate(one.layers):
            signed = tap[f"{path}.weights"][0]
            assert signed.min() < 0
            for head, row in ((0, 0), (1, -1)):
                read = signed[head, row].abs()
                torch.testing.assert_close(one.weights[layer, head, row], read / read.sum())
    assert views["cross"].measure == "attention weight"


def test_a_row_that_reads_nothing_stays_empty():
    found = shares(torch.tensor([[0.0, 0.0], [-3.0, 1.0]]))
    assert found.tolist() == [[0.0, 0.0], [0.75, 0.25]]


def test_the_picture_says_what_it_shows(task):
    one = attend(task, TEXT)[0]
    figure = draw_attention_grid(one.weights, one.rows, one.columns, measure=one.measure)
    assert figure.axes[-1].get_ylabel() == "|weight| / Σ |weight|\n(square-root scale)"


def test_the_command_draws_them(task, tmp_path):
    draw(task, TEXT, tmp_path, None, None)
    names = ["cross.png", "decoder-memory.png", "decoder.png", "encoder-memory.png"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names
    with Image.open(tmp_path / names[1]) as image:
        assert image.format == "PNG" and image.width > 100


def test_one_layer_is_drawn_where_it_looks(task, tmp_path):
    draw(task, TEXT, tmp_path, 2, 1)
    names = ["cross.png", "decoder-memory.png", "encoder-memory.png"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == names
    with pytest.raises(QkvError, match="there is no layer 3: the model has layers 1 to 2"):
        draw(task, TEXT, tmp_path, 3, None)
