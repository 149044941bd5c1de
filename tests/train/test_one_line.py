"""One line changes the mixer of a recipe: by its bare name, or by a table."""

import os
import subprocess
import sys

import pytest
import torch

from qkv.errors import QkvError
from qkv.parts import GLA, LSTM, Attention, Gated, Mamba, Memory, Retention, Rwkv6
from qkv.recipes import find
from qkv.train import Cosine, Run, Trainer, load_recipe, start

MIXER = "model.stack.*.attn.f"
TINY = (
    *("model.width=16", "model.stack.depth=2", "model.**.hidden=16", "model.embed.position.size=16"),
    *("data.context=16", "train.steps=2", "train.tokens_per_batch=32"),
)


def mixers(*settings: str, recipe: str = "write") -> set:
    stack = load_recipe(find(recipe), settings).model.stack
    return {layer.branches["attn"].f for layer in stack.layers}


@pytest.mark.parametrize(
    ("line", "mixer"),
    [
        ("retention", Retention(4)),
        ("gla", GLA(4)),
        ("rwkv6", Rwkv6(4)),
        ("memory", Memory(4)),
        ("lstm", LSTM()),
        ("mamba", Mamba()),
        ("attention", Attention(4)),
        ("{kind='attention', heads=2}", Attention(2)),
        ("{kind='mamba', state=8}", Mamba(state=8)),
    ],
)
def test_a_mixer_takes_what_it_needs_from_the_one_before(line, mixer):
    assert mixers(f"{MIXER}={line}") == {mixer}


def test_only_what_it_needs():
    window = MIXER + "={kind='attention', heads=2, dropout=0.5, bias=true}"
    assert mixers(window, f"{MIXER}=attention") == {Attention(2)}
    recipe = load_recipe(find("write"), ["model.stack.*.ffn.f=gated", "optimizer.schedule=cosine"])
    assert {layer.branches["ffn"].f for layer in recipe.model.stack.layers} == {Gated(512)}
    assert recipe.optimizer.schedule == Cosine()
    assert load_recipe(find("recall"), ["data.train=recall.txt"]).data.train == "recall.txt"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("retentoin", r"^model\.stack\.\*\.attn\.f: expected a table that describes a Mixer, found 'retentoin'"),
        ("experts", r"the key 'hidden' is missing"),
        ("cosine", r"'cosine' is no Mixer"),
    ],
)
def test_a_name_that_does_not_fit_is_told(line, words):
    with pytest.raises(QkvError, match=words):
        mixers(f"{MIXER}={line}")


def test_a_text_and_a_line_are_enough_on_the_command_line(tmp_path):
    (tmp_path / "input.txt").write_text("to be, or not to be\n" * 40)
    settings = ["data.train=input.txt", f"{MIXER}=delta-net", "model.stack.1.attn.f={kind='mamba'}", *TINY]
    command = [sys.executable, "-c", "from qkv.cli import main; main()", "train", "write"]
    command += [word for setting in settings for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (0, "runs/write\n"), done.stderr
    run = Run(tmp_path / "runs/write")
    assert [row["split"] for row in run.metrics()] == ["train", "valid"]
    kinds = [layer.branches["attn"].f.kind for layer in run.recipe.model.stack.layers]
    assert kinds == ["delta-net", "mamba"]


def test_recall_trains_and_goes_on_bit_for_bit(tmp_path):
    task = "{kind='associative-recall', examples=40, pairs=3, length=20}"
    few = [f"data.train={task}", f"data.valid={task}", "data.context=22", "model.embed.position.size=22"]
    few += ["model.width=16", "train.tokens_per_batch=88", "train.log_every=1", f"{MIXER}={{kind='gla', heads=2}}"]
    recipe = load_recipe(find("recall"), [*few, "train.steps=16", "train.save_every=5"])
    straight = Trainer(start(recipe, tmp_path / "straight", tmp_path))
    straight.train()
    rows = straight.run.metrics()
    assert rows[-1]["split"] == "valid" and rows[-1]["loss"] < rows[0]["loss"]
    cut = Trainer(start(recipe, tmp_path / "cut", tmp_path))
    learn = cut.learn
    cut.learn = lambda examples: learn(examples) if cut.step < 12 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        cut.train()
    resumed = Trainer(Run(tmp_path / "cut"))
    assert resumed.step == 10
    resumed.train()
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)
