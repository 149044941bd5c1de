"""`qkv bench`: what it measures of each kind of model, what its bounds count, what it leaves out. No test of a time."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qkv.checkpoints.gguf_model import load_gguf
from qkv.checkpoints.load import load_directory
from qkv.cli import main
from qkv.errors import QkvError
from qkv.look import bench
from qkv.look.limits import Limits, measure_limits, peak_memory, sound
from qkv.models import Module
from qkv.use.convert import convert
from tests.use import small

LIMITS = Limits(1, 1e9, {"fp32": 1e10, "bf16": 2e10, "int8": 4e10})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    small.llama(made / "llama", hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    small.gpt2(made / "gpt2")
    small.bert(made / "bert")
    small.t5(made / "t5")
    convert(made / "llama", made / "llama.gguf", kind="Q8_0")
    return made


@pytest.fixture
def quick(monkeypatch, folder):
    """The command, without the measurements that have nothing to do with the model, and without processes."""
    monkeypatch.setattr(bench, "measure_limits", lambda threads: LIMITS)
    monkeypatch.setattr(bench, "start", lambda *_: bench.Start(1.5, 10**8))
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.chdir(folder)


def run(*arguments: object, capfd: pytest.CaptureFixture[str], code: int = 0) -> str:
    sys.stdin, sys.argv = io.StringIO(), ["qkv", *map(str, arguments)]
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capfd.readouterr()
    assert int(left.value.code or 0) == code, err
    return out if not code else err


@pytest.mark.parametrize(
    ("name", "works"),
    {
        "llama": ["decode", "decode, 16 texts together", "read a prompt of 512"],
        "llama.gguf": ["decode", "decode, 16 texts together", "read a prompt of 512"],
        "gpt2": ["decode", "decode, 16 texts together", "read a prompt of 64"],
        "bert": ["read texts of 8 to 96 tokens"],
        "t5": ["answer a text, beam 4", "answer 16 texts together, beam 4"],
    }.items(),
)
def test_each_kind_of_model_has_its_figures(name, works, quick, capfd, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 4)
    monkeypatch.setattr(bench, "OUT", 3)
    found = json.loads(run("bench", name, "--seconds", 0.01, "--json", capfd=capfd))
    assert [figure["work"] for figure in found["figures"]] == works
    assert list(found["bytes"]) == list(found["starts"]) == ["native", "torch"] and not found["notes"]
    for figure in found["figures"]:
        for speed in figure["speeds"].values():
            assert speed["rate"] > 0 and speed["reading"] > 0 and speed["multiplying"] > 0
    assert found["limits"]["bandwidth"] == 1e9 and found["parameters"] > 10_000


def test_the_table_says_the_same(quick, capfd, monkeypatch):
    speeds = {"native": bench.Speed(200.0, 0.85, 0.1), "torch": bench.Speed(50.0, 0.2, 0.4)}
    monkeypatch.setattr(bench, "measured", lambda work, *_: bench.Figure(work.name, work.unit, speeds))
    out = run("bench", "llama", capfd=capfd).splitlines()
    assert out[0].startswith("llama: ") and "MB native" in out[0]
    assert "reads 1.0 GB/s, multiplies 10 fp32, 20 bf16, 40 int8 Gop/s" in out[1]
    row = next(line for line in out if line.startswith("decode, tokens/s"))
    assert row.split() == ["decode,", "tokens/s", "200.0", "85%", "reading", "50.0", "40%", "multiplying", "4.00"]
    assert out[-1] == "start to the first result, torch: 1.5 s, 100 MB at most"


def test_a_part_without_a_kernel_leaves_torch_and_says_so(quick, capfd, monkeypatch):
    def unlowered(model: Module, threads: int, say: Callable[[str], None]) -> Module:
        say("no native kernel for the mixer Odd")
        return model

    monkeypatch.setattr(bench, "fast", unlowered)
    found = json.loads(run("bench", "gpt2", "--seconds", 0.001, "--json", capfd=capfd))
    assert list(found["bytes"]) == ["torch"]
    assert found["notes"] == ["no native kernel for the mixer Odd"]


def test_no_compiler_leaves_torch(quick, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise QkvError("there is no C++ compiler")

    monkeypatch.setattr(bench, "fast", refuse)
    found = bench.bench("gpt2", seconds=0.001)
    assert list(found.bytes) == ["torch"] and found.notes == ["there is no C++ compiler"]
    assert "÷" not in str(found) and "native" not in str(found)


def test_weights_that_do_not_fit_unpacked_are_left_packed(quick, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda: 1000)
    found = bench.bench("llama.gguf", seconds=0.001)
    assert list(found.bytes) == ["native"] and "are free" in found.notes[0]


def test_work_is_no_larger_than_the_model_is_slow(folder):
    model = load_directory(folder / "llama")
    each = 2 * (counted(folder / "llama", "proj") + counted(folder / "llama", "lm_head")) / 1e10
    assert bench.fitting(512, 32, model, LIMITS, 256 * each) == 512
    assert bench.fitting(512, 32, model, LIMITS, 127 * each) == 128
    assert bench.fitting(512, 32, model, LIMITS, 0) == 32


def test_a_process_of_its_own_says_what_it_took(folder):
    made = bench.start(folder / "gpt2", "torch", None, 1)
    here = peak_memory()
    assert made.bytes is not None and here is not None
    assert made.seconds > 0 and 5e7 < made.bytes < 4 * here


@pytest.mark.parametrize("arguments", [("--seconds", 0), ("--threads", 0)])
def test_nonsense_is_refused(arguments, quick, capfd):
    assert "a measurement takes " in run("bench", "gpt2", *arguments, capfd=capfd, code=2)


# --- the bounds ---


def counted(folder: Path, *patterns: str) -> int:
    """The weights of matrices in the transformers package's model, by parts of their names."""
    state = tf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return sum(x.numel() for name, x in state.items() if x.dim() > 1 and any(p in name for p in patterns))


def work(**passes: tuple[int, int]) -> bench.Work:
    return bench.Work("", "", lambda model: lambda: None, 1, passes)


def test_the_bounds_count_the_weights_that_are_used(folder):
    layers, head = counted(folder / "llama", "proj"), counted(folder / "llama", "lm_head")
    model = load_directory(folder / "llama")
    read, multiply = bench.least(work(text=(2, 6), head=(1, 1)), model, LIMITS)
    assert read == pytest.approx(4 * (2 * layers + head) / 1e9)
    assert multiply == pytest.approx(2 * (6 * layers + head) / 1e10)
    packed = load_gguf(folder / "llama.gguf", packed=True)
    read, multiply = bench.least(work(text=(1, 1)), packed, LIMITS)
    assert read == pytest.approx(layers * 34 / 32 / 1e9) and multiply == pytest.approx(2 * layers / 4e10)
    model.to(torch.bfloat16)
    assert bench.least(work(head=(1, 1)), model, LIMITS) == pytest.approx((2 * head / 1e9, 2 * head / 2e10))


def test_of_experts_only_the_chosen_are_counted(tmp_path):
    sizes: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 6}
    widths = {**small.WIDTHS, "num_key_value_heads": 2, "vocab_size": 50}
    tf.MixtralForCausalLM(tf.MixtralConfig(**widths, **sizes)).save_pretrained(tmp_path)
    model = load_directory(tmp_path)
    attention = 2 * (2 * 24 * 24 + 2 * 24 * 12) + 2 * 24 * 8  # queries and outputs, keys and values, routers
    expert = 2 * 3 * 24 * 40
    read, multiply = bench.least(work(text=(1, 1)), model, LIMITS)
    assert read == pytest.approx(4 * (attention + 2 * expert) / 1e9)
    assert multiply == pytest.approx(2 * (attention + 2 * expert) / 1e10)
    read, multiply = bench.least(work(text=(1, 16)), model, LIMITS)
    assert read == pytest.approx(4 * (attention + 8 * expert) / 1e9)  # no expert is read twice
    assert multiply == pytest.approx(32 * (attention + 2 * expert) / 1e10)


def test_a_tied_table_is_read_once_as_the_head(folder):
    model = load_directory(folder / "gpt2")
    table = model.wiring.embed.table
    assert [id(weight) for weight, _ in bench.parts(model)["head"]] == [id(table)]
    assert all(weight is not table for weight, _ in bench.parts(model)["text"])


def test_limits_are_measured_for_every_type_that_torch_multiplies_well():
    before = torch.get_num_threads()
    found = measure_limits(2, size=1 << 12, side=64)
    assert found.threads == 2 and torch.get_num_threads() == before
    assert {"fp32"} <= found.products.keys() <= {"fp32", "bf16", "int8"}
    assert sound({"fp32": 3.0, "bf16": 2.9, "int8": None}) == {"fp32": 3.0}
    assert sound({"fp32": 3.0, "bf16": 3.0, "int8": 6.0}) == {"fp32": 3.0, "bf16": 3.0, "int8": 6.0}
    assert min(found.bandwidth, *found.products.values()) > 0
    assert Limits(1, 1.0, {"fp32": 3.0}).product("int8") == 3.0
