"""`qkv convert` on one's own runs: what others can load they load and it answers the same, the rest stays qkv's own."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qkv.cli import main
from qkv.errors import QkvError
from qkv.train import Trainer, load_recipe, start
from qkv.train.run import open_task
from tests.train.small import RECIPE, write_data
from tests.zoo.parity import relative

TEXT = """
[data]
train = "text.txt"
text = "text"
tokenizer = { kind = "bpe", size = 300 }
context = 24

[objective]
kind = "next-token"

[optimizer]
kind = "adamw"
lr = 1e-2

[train]
steps = 8
tokens_per_batch = 128
"""
LLAMA = """
[model]
preset = "smollm2-135m"
width = 32
"**.kv_heads" = 1
"**.heads" = 4
"**.f.hidden" = 48
"stack.depth" = 2
"""
T5 = """
[model]
preset = "t5-small"
width = 64
"**.heads" = 4
"**.head_width" = 8
"head.scale" = 0.125
"**.f.hidden" = 48
"**.depth" = 1
"""
TARGET = 'target = { kind = "tokens", position = { kind = "sinusoidal" } }'
LINES = ["the cat sat on the mat", "a dog ran", "the mat ran on"] * 20
ASKED = ["the", "a dog", "", "naïve 東京"]
WORDS = ["abc", "edcba", "a", "bbdd"]
BART = """
[model]
preset = "bart-base"
width = 32
"**.heads" = 4
"**.f.hidden" = 48
"**.depth" = 1
"""
CHARACTERS = 'tokenizer = { kind = "character" }'
RUNS = {
    "llama": LLAMA + TEXT,
    "t5": T5 + RECIPE[RECIPE.index("[data]") :],
    "bart": BART + RECIPE[RECIPE.index("[data]") :],
    "transformer": RECIPE,
    "apart": RECIPE.replace(CHARACTERS, f"{CHARACTERS}\ntarget_{CHARACTERS}").replace("width", f"{TARGET}\nwidth"),
}


@dataclass
class Done:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    (folder / "text.txt").write_text("\n".join(LINES), encoding="utf-8")
    for name, recipe in RUNS.items():
        (folder / f"{name}.toml").write_text(recipe, encoding="utf-8")
        Trainer(start(load_recipe(folder / f"{name}.toml"), folder / name, folder)).train()
    return folder


@pytest.fixture
def qkv(runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    monkeypatch.chdir(runs)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["qkv", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        sys.stdout.flush()
        return Done(int(left.value.code or 0), *capfd.readouterr())

    return run


Qkv = Callable[..., Done]


@torch.no_grad()
def test_a_decoder_is_one_that_others_load(qkv: Qkv, tmp_path: Path) -> None:
    before = open_task("llama")
    assert (
        qkv("convert", "llama", tmp_path / "out").out
        == f"{tmp_path / 'out'}: {before.model.count():,} parameters, float32\n"
    )
    assert qkv("convert", "llama", tmp_path / "out.gguf", "--type", "F32").out.startswith(f"{tmp_path / 'out.gguf'}: ")
    for name in ("out", "out.gguf"):
        after = open_task(tmp_path / name)
        assert after.frame == before.frame == ([2], []) and after.target.ends == before.target.ends
        assert [after.encode(text) for text in ASKED] == [before.encode(text) for text in ASKED]
        assert [a.ids for [a] in after.predict(ASKED, tokens=9)] == [b.ids for [b] in before.predict(ASKED, tokens=9)]
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert [tokenizer(text)["input_ids"] for text in ASKED] == [before.encode(text) for text in ASKED]
    ids = torch.tensor([before.encode(LINES[0])])
    assert relative(theirs.eval()(ids).logits, before.model(ids)) < 1e-5
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (2, [3])
    assert "bfloat16" in qkv("convert", "llama", tmp_path / "half", "--dtype", "bf16").out


@pytest.mark.parametrize("run", ["t5", "bart"])
def test_an_encoder_decoder_begins_its_answers_as_it_was_trained_to(run: str, qkv: Qkv, tmp_path: Path) -> None:
    before = open_task(run)
    assert qkv("convert", run, tmp_path / "out").out.endswith("float32\n")
    after = open_task(tmp_path / "out")
    assert after.begin == before.begin == [2] and after.frame == before.frame == ([], [3])
    assert after.manner == replace(before.manner, begin=(2,))
    answers = before.predict(WORDS, tokens=9)
    assert [a.ids[:9] for [a] in after.predict(WORDS, tokens=9)] == [b.ids[:9] for [b] in answers]
    theirs, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    found = theirs.generate(**tokenizer(WORDS[0], return_tensors="pt"), max_new_tokens=9, do_sample=False)[0].tolist()
    assert found[0] == 2 and [i for i in found[1:] if i != 3] == answers[0][0].ids[:9]


@pytest.mark.parametrize(("run", "why"), [
    ("transformer", "no published family describes this model, so other tools cannot load it: "),
    ("apart", "no published family has such a tokenizer for each side, so other tools cannot load the model"),
])  # fmt: skip
def test_a_model_of_no_family_stays_ours(run: str, why: str, qkv: Qkv, tmp_path: Path) -> None:
    before = open_task(run)
    first, second = qkv("convert", run, tmp_path / "out").out.splitlines()
    assert first == f"{tmp_path / 'out'}: {before.model.count():,} parameters, float32, in qkv's own form"
    assert second.startswith(f"  {why}")
    after = open_task(tmp_path / "out")
    assert after.model.spec == before.model.spec and after.tokenizers.joint == (run != "apart")
    assert after.predict(WORDS) == before.predict(WORDS)
    told = qkv("convert", tmp_path / "out", tmp_path / "again").out.splitlines()  # as it may be converted once more
    assert told[1] == second and open_task(tmp_path / "again").predict(WORDS) == before.predict(WORDS)
    done = qkv("convert", run, tmp_path / "out.gguf")
    assert (done.code, done.out) == (2, "") and done.err.startswith(f"qkv: {why}")
    assert sorted(os.listdir(tmp_path)) == ["again", "out"]


@torch.no_grad()
def test_a_run_with_weights_of_fewer_bits(qkv: Qkv, tmp_path: Path) -> None:
    before = open_task("llama")
    first, second, third, *left = qkv("convert", "llama", tmp_path / "out", "--quantize", "int8").out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: {before.model.count():,} parameters in 0.0 MB, before in 0.1 MB")
    assert second.startswith("  matrices: 13 in Q8_0; only qkv loads them")
    assert third.startswith("  perplexity ") and left[0].startswith("  as they were, with rows that are no multiple")
    after = open_task(tmp_path / "out", packed=True)
    ids = torch.tensor([before.encode(LINES[0])])
    assert 0 < relative(after.model(ids), before.model(ids)) < 0.05
    assert [after.encode(text) for text in ASKED] == [before.encode(text) for text in ASKED]
    assert sorted(os.listdir(tmp_path / "out")) == ["model.safetensors", "spec.json", "tokenizer.json"]
    with pytest.raises(QkvError, match="llama keeps no weights packed"):
        open_task("llama", packed=True)
    done = qkv("convert", "llama", tmp_path / "x.gguf", "--quantize", "int8", "--type", "Q8_0")
    assert done.code == 2 and "--quantize writes a directory and --type a .gguf file: give one of them" in done.err
    done = qkv("convert", "llama", tmp_path / "x", "--quantize", "int9")
    assert done.code == 2 and "not to 'int9'; did you mean" in done.err
    assert os.listdir(tmp_path) == ["out"]
    said = qkv("convert", "apart", tmp_path / "two", "--quantize", "int8").out  # no text is of both vocabularies
    assert "the error was not measured: its target has a vocabulary of its own" in said
    assert qkv("convert", "llama", tmp_path / "x.GGUF").code == 0 and (tmp_path / "x.GGUF").is_file()


def test_what_is_there_is_left_alone(qkv: Qkv, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for run in ("llama", "transformer"):
        done = qkv("convert", run, tmp_path / "full")
        assert done.code == 2 and "full exists and is not an empty folder" in done.err
    assert "new.bin is neither a directory" in qkv("convert", "llama", tmp_path / "new.bin").err
    assert "--set belong to what others published" in qkv("convert", "llama", tmp_path / "new", "--set", "a=b").err
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["x"]
