"""What runs where there is no compiler: torch, by its own kernel for packed weights, and a line that says so."""

import sys
from pathlib import Path

import pytest
import torch

from qkv.adapt import quantise
from qkv.cli.engine import hurried
from qkv.models import Module
from qkv.native import build, fast, slow
from qkv.ops.blocks.packed import Packed
from qkv.use import Task
from tests.adapt.test_quantise import answer, model

LACK = "there is no C++ compiler (/nonexistent/c++): install g++ or clang, or name one in CXX"
WHY = f"{LACK}: torch runs this model, several times more slowly"


@pytest.fixture(autouse=True)
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setattr(sys.modules["qkv.native.fast"], "library", build.built.__wrapped__)


def served(made: Module) -> list[str]:
    return [name for name, x in made.named_parameters() if isinstance(x, Packed) and x.served is not None]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torch_multiplies_packed_weights(kind: str) -> None:
    made, said = model("tied"), []
    quantise(made, kind)
    exact, state = answer(made), made.state_dict()
    assert fast(made, say=said.append) is made and not made.programs
    packed = [name for name, x in made.named_parameters() if isinstance(x, Packed)]
    lost = "and multiplies 14 of 15 packed weights with activations in bfloat16"  # 29 tokens are no multiple of 16
    assert said == [f"{WHY}, {lost}"] and len(served(made)) == 14 and len(packed) == 15
    found = answer(made)
    assert 0 < (found - exact).abs().max() < 0.03 * exact.abs().max()
    after = made.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], x) for name, x in state.items())
    assert not served(slow(made)) and torch.equal(answer(made), exact)


def test_floats_stay_as_they_are() -> None:
    made, said = model("tied"), []
    exact = answer(made)
    fast(made, say=said.append)
    assert said == [WHY] and torch.equal(answer(made), exact)


def test_the_command_line_dequantises_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    made = model("experts")
    quantise(made, "int4")
    plain = [name for name, x in made.named_parameters() if not isinstance(x, Packed)]
    task = Task.__new__(Task)
    task.model = made
    hurried(task, adapted=False)
    assert capsys.readouterr().err.startswith(f"{WHY}, and multiplies 8 of ")
    left = [name for name, x in made.named_parameters() if isinstance(x, Packed)]
    assert left == served(made) and len(left) == 8 and len(plain) + len(left) < len(list(made.parameters()))
