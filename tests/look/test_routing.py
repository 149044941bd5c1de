"""Routing pictures: what they show is what the tap saw, and the files are pictures."""

import pytest
import torch
from PIL import Image
from tests.contracts.specs import rough
from tests.train.small import small_run

from qkv.cli.look import draw
from qkv.errors import QkvError
from qkv.look import Routing, route, routing_map
from qkv.look.routing import draw_routing
from qkv.parts import BiasedTopK, Experts, FeedForward, PlainExperts, TopK
from qkv.spec import edit
from qkv.train import Task

TEXT = "abcde"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    run = small_run(tmp_path_factory.mktemp("routing"))
    spec = edit(run.recipe.model, "encoder.**.ffn.f", Experts(8, count=5, router=BiasedTopK(2, scale=2.5)))
    spec = edit(spec, "decoder.**.ffn.f", PlainExperts(8, count=3, router=TopK(1, normalise=False)))
    return Task(rough(spec), run.tokenizers)


def test_it_is_what_each_token_s_gates_say(task):
    answer = task.predict([TEXT])[0][0]
    encoder, decoder = route(task, TEXT, answer)
    ids = task.encode(TEXT)
    assert (encoder.kind, encoder.layers, encoder.tokens) == ("encoder", ["encoder.0.ffn"], task.source.pieces(ids))
    assert (decoder.kind, len(decoder.tokens)) == ("decoder", len(answer.ids) + len(task.begin))
    (gates,), (load,) = encoder.gates, encoder.loads
    assert gates.shape == (5, len(ids)) and load.shape == (5,)
    torch.testing.assert_close(gates.sum(0), torch.ones(len(ids), dtype=torch.float64))
    assert ((gates > 0).sum(0) == 2).all()
    torch.testing.assert_close(load, (gates > 0).sum(1) / (2 * len(ids)))
    assert set(decoder.gates[0].unique().tolist()) == {0.0, 1.0}
    assert [one.kind for one in route(task, TEXT)] == ["encoder"]


def test_the_picture(task, tmp_path):
    routing = route(task, TEXT)[0]
    figure = draw_routing(routing)
    tokens, load = figure.axes[:2]
    assert [label.get_text() for label in tokens.get_yticklabels()] == ["1", "2", "3", "4", "5"]
    assert [label.get_text() for label in tokens.get_xticklabels()] == routing.tokens
    assert torch.equal(torch.from_numpy(tokens.images[0].get_array().data), routing.gates[0])
    assert [bar.get_width() for bar in load.patches] == pytest.approx(routing.loads[0].tolist())
    with Image.open(routing_map(routing, path=tmp_path / "routing.png")) as image:
        assert image.format == "PNG" and image.width > 100


def test_the_command_draws_it_beside_the_attention(task, tmp_path, capsys):
    draw(task, TEXT, tmp_path, None, None)
    assert [path.name for path in sorted(tmp_path.glob("routing-*"))] == ["routing-decoder.png", "routing-encoder.png"]
    assert f"{tmp_path / 'routing-encoder.png'}\n" in capsys.readouterr().out


def test_long_texts_and_many_experts_fit_on_a_page():
    gates = torch.rand(64, 500).double()
    routing = Routing("stack", ["word"] * 500, ["stack.0.ffn"] * 4, [gates] * 4, [torch.full((64,), 1 / 64)] * 4)
    assert max(draw_routing(routing).get_size_inches()) < 28


def test_a_model_without_experts_has_no_routing(task):
    dense = edit(task.model.spec, "**.ffn.f", FeedForward(8))
    assert route(Task(rough(dense), task.tokenizers), TEXT) == []


def test_no_tokens_are_refused():
    with pytest.raises(QkvError, match="found no tokens"):
        draw_routing(Routing("stack", [], [], [], []))
