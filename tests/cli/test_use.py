"""The commands that use a checkpoint: what they print, where, and one sentence for what they cannot do."""

import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qkv.adapt import add_lora, loras, save_adapter
from qkv.cli import main
from qkv.decode import Sample
from qkv.native.build import built
from qkv.use import embed, extract, open_published, score, tag
from tests.use import small
from tests.use.small import SENTENCES

MODELS: dict[str, Any] = {
    "llama": {}, "speaker": {"chat": True}, "gpt2": {}, "bert": {}, "t5": {}, "bart": {},
    "classifier": {"head": "ForSequenceClassification"}, "tagger": {"head": "ForTokenClassification"},
    "answers": {"head": "ForQuestionAnswering"}, "vectors": {"head": "Model"},
}  # fmt: skip


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built()  # what is said of that once is no part of what a command says
    made = tmp_path_factory.mktemp("use")
    for name, options in MODELS.items():
        make = {"speaker": small.llama}.get(name) or getattr(small, name, small.bert)
        make(made / name, **options)
    (made / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    (made / "empty.txt").write_text("")
    (made / "latin.txt").write_bytes(b"na\xefve\n")
    (made / "nothing").mkdir()
    return made


@pytest.fixture
def qkv(folder, tmp_path, monkeypatch, capfd):
    """The program in this process; files are named as they stand in the module's folder."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("QKV_TRACEBACK", raising=False)

    def run(*arguments: object, stdin: str | bytes = "") -> Done:
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["qkv", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        sys.stdout.flush()
        out, err = capfd.readouterr()
        return Done(int(left.value.code or 0), out, err)

    return run


def test_generate_streams_and_tells_programs(qkv, folder):
    task = open_published(folder / "llama")
    wanted = "".join(task.stream(task.encode(SENTENCES[0]), tokens=12))
    done = qkv("generate", "llama", SENTENCES[0], "--tokens", 12)
    assert (done.code, done.out) == (0, wanted + "\n")
    assert done.err == f"{task.model.count():,} parameters, float32\n"
    told = qkv("generate", "llama", "-", "--tokens", 12, "--json", stdin=SENTENCES[0] + "\n")
    assert told.lines == [{"prompt": SENTENCES[0], "text": wanted}]
    assert qkv("generate", "llama", SENTENCES[0], "--tokens", 12, "--temperature", 0).out == done.out
    stop = wanted[4:7]
    assert (
        qkv("generate", "llama", SENTENCES[0], "--tokens", 12, "--stop", stop).out
        == wanted[: wanted.index(stop)] + "\n"
    )
    drawn = [qkv("generate", "llama", "x", "--tokens", 9, "--top-p", 0.9, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert "bfloat16" in qkv("generate", "llama", "x", "--tokens", 1, "--dtype", "bf16").err


def test_a_seed_keeps_the_checkpoints_own_sampling(qkv, folder):
    path = folder / "llama" / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(before), "do_sample": True, "temperature": 0.5, "top_k": 7}))
        task = open_published(folder / "llama")
        sampling = Sample(temperature=0.5, top_k=7, seed=4)
        wanted = "".join(task.stream(task.encode("name"), sampling, tokens=12))
        assert qkv("generate", "llama", "name", "--tokens", 12, "--seed", 4).out == wanted + "\n"
    finally:
        path.write_text(before)


def test_chat_answers_each_line(qkv, folder):
    from qkv.use import Chat

    talk = Chat(open_published(folder / "speaker"), "Be short.")
    wanted = ["".join(talk.say(line, tokens=8)) for line in ("Hi", "Why?")]
    done = qkv("chat", "speaker", "--system", "Be short.", "--tokens", 8, stdin="Hi\nWhy?\n\nnever read\n")
    assert (done.code, done.out) == (0, "".join(f"{answer}\n" for answer in wanted))
    assert qkv("chat", "speaker", stdin="").out == ""


@pytest.mark.parametrize("options", [("--lookup", 4), ("--draft", "llama")], ids=["lookup", "draft"])
def test_what_is_proposed_changes_no_text_and_is_counted(qkv, options):
    asked = ["generate", "llama", SENTENCES[0], "--tokens", 30]
    plain, done = qkv(*asked), qkv(*asked, *options)
    assert (done.code, done.out) == (0, plain.out)
    assert re.fullmatch(r"\d+ of \d+ proposed tokens stood \(\d+%\), \d+\.\d tokens a pass", done.err.splitlines()[-1])
    assert ("(100%)" in done.err) == ("--draft" in options)


def test_chat_takes_what_proposes(qkv):
    asked = ["chat", "speaker", "--tokens", 20]
    plain = qkv(*asked, stdin="Hi\nWhy?\n")
    for options in (("--lookup", 4), ("--draft", "speaker")):
        done = qkv(*asked, *options, stdin="Hi\nWhy?\n")
        assert done.out == plain.out and done.err.count("proposed tokens stood") == 1


def test_predict_does_what_the_model_is_for(qkv, folder):
    for name in ("llama", "t5", "bart", "classifier"):
        task = open_published(folder / name)
        found = task.predict(SENTENCES, tokens=9)
        done = qkv("predict", name, "texts.txt", "--tokens", 9)
        assert (done.code, done.err) == (0, "")
        assert done.out == "".join(f"{answers[0].text}\n" for answers in found), name
        told = qkv("predict", name, "-", "--tokens", 9, "--json", stdin="\n".join(SENTENCES)).lines
        assert [line["source"] for line in told] == SENTENCES
        assert [[one["text"] for one in line["answers"]] for line in told] == [[a.text for a in row] for row in found]
        if name == "classifier":
            assert all(
                math.isclose(sum(math.exp(one["score"]) for one in line["answers"]), 1, rel_tol=1e-5) for line in told
            )
    task = open_published(folder / "bert")
    assert qkv("predict", "bert", "a [MASK] name").out == task.fill("a [MASK] name").text + "\n"


def test_predict_tags_tokens(qkv, folder):
    task = open_published(folder / "tagger")
    rows = [[(one.text, one.label) for one in tag(task, text)] for text in SENTENCES]
    done = qkv("predict", "tagger", "texts.txt")
    blocks = done.out.removesuffix("\n\n").split("\n\n")
    assert [[tuple(line.split("\t")[:2]) for line in block.splitlines()] for block in blocks] == rows
    assert all(0.5 <= float(line.split("\t")[2]) <= 1 for block in blocks for line in block.splitlines())
    told = qkv("predict", "tagger", SENTENCES[0], "--json").lines
    assert told[0]["source"] == SENTENCES[0]
    assert [(one["text"], one["label"]) for one in told[0]["tags"]] == rows[0]
    assert all(SENTENCES[0][one["start"] : one["end"]] == one["text"] for one in told[0]["tags"])


def test_predict_extracts_answers(qkv, folder):
    task, question = open_published(folder / "answers"), "What is looked up?"
    wanted = [extract(task, question, text) for text in SENTENCES]
    lines = "\n".join(f"{question}\t{text}" for text in SENTENCES)
    assert qkv("predict", "answers", "-", stdin=lines).out == "".join(f"{one.text}\n" for one in wanted)
    told = qkv("predict", "answers", f"{question}\t{SENTENCES[1]}", "--json").lines
    assert told == [
        {
            "source": f"{question}\t{SENTENCES[1]}",
            "answers": [{"text": wanted[1].text, "score": pytest.approx(wanted[1].score)}],
        }
    ]


def test_embed_prints_writes_and_compares(qkv, folder, tmp_path):
    vectors = embed(open_published(folder / "vectors"), SENTENCES)
    told = qkv("embed", "vectors", "texts.txt").lines
    assert [line["text"] for line in told] == SENTENCES
    assert np.allclose([line["vector"] for line in told], vectors, atol=1e-6)
    done = qkv("embed", "vectors", "texts.txt", "--out", tmp_path / "v.npy", "--batch", 3)
    assert done.out == f"{tmp_path / 'v.npy'}\n" and np.allclose(np.load(tmp_path / "v.npy"), vectors, atol=1e-6)
    done = qkv("embed", "vectors", "-", "--similarity", stdin="\n".join(SENTENCES))
    found = [[float(x) for x in line.split("\t")] for line in done.out.splitlines()]
    assert np.allclose(found, torch.nn.functional.cosine_similarity(vectors[None], vectors[:, None], -1), atol=1e-4)
    assert len(qkv("embed", "vectors", "name " * 300).lines) == 1  # cut off


def test_fill_ranks_candidates(qkv, folder):
    wanted = open_published(folder / "bert").candidates("[MASK] name [MASK]", 3)
    done = qkv("fill", "bert", "[MASK] name [MASK]", "--best", 3)
    blocks = [block.splitlines() for block in done.out.removesuffix("\n").split("\n\n")]
    assert [[line.split() for line in block] for block in blocks] == [
        [[f"{math.exp(one.score):.4f}", one.text] for one in row] for row in wanted
    ]
    told = qkv("fill", "bert", "[MASK] name [MASK]", "--best", 3, "--json").lines
    assert [line["mask"] for line in told] == [1, 2]
    assert [[one["text"] for one in line["candidates"]] for line in told] == [
        [one.text for one in row] for row in wanted
    ]


def test_score_of_a_file(qkv, folder):
    found = score(open_published(folder / "llama"), (folder / "texts.txt").read_text(), context=16, stride=3)
    [told] = qkv("score", "llama", "texts.txt", "--context", 16, "--stride", 3, "--json").lines
    assert math.isclose(told["perplexity"], found.perplexity, rel_tol=1e-6) and told["tokens"] == found.tokens
    assert math.isclose(told["nats_per_token"], found.nats / found.tokens, rel_tol=1e-6)
    done = qkv("score", "llama", "texts.txt", "--context", 16, "--stride", 3, "--torch")
    assert f"{found.perplexity:,.4f}" in done.out and f"{found.bits_per_byte:,.4f}" in done.out


def test_convert_diff_and_inspect(qkv, folder, tmp_path):
    done = qkv("convert", "llama", tmp_path / "b.gguf", "--type", "F32")
    assert done.code == 0 and done.out.startswith(f"{tmp_path / 'b.gguf'}: ")
    assert qkv("diff", "llama", tmp_path / "b.gguf").out == "the two models are made of the same parts\n"
    done = qkv("convert", tmp_path / "b.gguf", tmp_path / "c", "--dtype", "bf16")
    assert done.out.endswith("parameters, bfloat16\n")
    assert qkv("generate", tmp_path / "c", "name", "--tokens", 3).code == 0
    changes = qkv("diff", "llama", "gpt2").out.splitlines()
    assert len(changes) > 2 and "made of the same parts" not in changes[0]
    told = json.loads(qkv("inspect", "llama", "--json").out)
    assert told["root"]["parameters"] == open_published(folder / "llama").model.count()
    assert "Attention(heads=4, kv_heads=2" in qkv("inspect", tmp_path / "b.gguf").out


def test_look_draws_any_model(qkv, tmp_path):
    done = qkv("look", "bert", "a name", "--out", tmp_path / "look", "--layer", 2, "--head", 1)
    assert (done.code, done.out) == (0, f"{tmp_path / 'look' / 'self.png'}\n")
    assert qkv("look", "t5", "a name", "--out", tmp_path / "pair").out.count(".png\n") == 3


MISTAKES = [
    (["generate", "gone", "x"], "'gone' is no file, no folder and no name to pull"),
    (["generate", "smollm2-135m-instuct", "x"], "did you mean 'smollm2-135m-instruct'"),
    (["generate", "nothing", "x"], "nothing holds no model: neither config.json nor"),
    (["generate", "texts.txt", "x"], "texts.txt is no model: a directory, a .gguf file or a .bin file"),
    (["generate", "bert", "x"], "only a decoder continues a text: `qkv predict`"),
    (["generate", "t5", "x"], "only a decoder continues a text"),
    (["generate", "llama", "x", "--temperature", "-1"], "the temperature is at least 1e-6"),
    (["generate", "llama", "x", "--top-p", "2"], "top_p lies in (0, 1]"),
    (["generate", "llama", "x", "--top-k", "0"], "top_k keeps at least 1 token"),
    (["generate", "llama", "x", "--min-p", "-0.1"], "min_p in [0, 1]"),
    (["generate", "llama", "x", "--tokens", "0"], "0 new tokens are asked for; at least 1 is made"),
    (["generate", "llama", "x", "--stop", ""], "an empty stop string would end every text"),
    (["generate", "llama", "x", "--lookup", "0"], "at least the last token is looked up, not 0"),
    (["generate", "llama", "x", "--lookup", "3", "--draft", "llama"], "take either --draft or --lookup"),
    (["generate", "llama", "x", "--draft", "speaker"], "a draft has the model's tokenizer, token by token"),
    (["generate", "llama", "x", "--draft", "bert"], "both models must be decoders"),
    (["generate", "llama", "x", "--dtype", "fp8"], "no dtype is called 'fp8'"),
    (["generate", "gpt2", ""], "text 1 is empty and the model has no token that begins a text"),
    (["generate", "gpt2", "name " * 90], "tokens and the model takes 64: shorten or split it"),
    (["chat", "llama"], "no chat template 'default' came with the tokenizer"),
    (["chat", "bert"], "no chat template 'default' came with the tokenizer"),
    (["predict", "vectors", "x"], "this model has no head that answers a text: `qkv embed`"),
    (["predict", "bert", "x"], "there is no [MASK] to fill in 'x'"),
    (["predict", "answers", "x"], "text 1 has no tab: this model takes a question, a tab"),
    (["predict", "llama", "gone.txt"], "gone.txt does not exist; a text, a file with one text a line, or -"),
    (["predict", "llama", ""], "the text is empty"),
    (["predict", "llama", "latin.txt"], "latin.txt is not UTF-8 (byte 3)"),
    (["predict", "llama", "x", "--last"], "is no run, which alone has a last checkpoint"),
    (["embed", "vectors", "gone.txt"], "gone.txt does not exist"),
    (["embed", "vectors", "nothing"], "nothing is a directory"),
    (["embed", "vectors", "x", "--batch", "0"], "a batch holds at least 1 text, not 0"),
    (["embed", "vectors", "x", "--out", "new.txt"], "name a file that ends in .npy, not new.txt"),
    (["embed", "t5", "x"], "an encoder-decoder has no vector of a text"),
    (["fill", "bert", "no mask"], "there is no [MASK] to fill in 'no mask'"),
    (["fill", "bert", "[MASK]", "--best", "0"], "0 candidates are asked for; at least 1 is given"),
    (["fill", "llama", "[MASK]"], "only an encoder with a vocabulary head fills masks"),
    (["score", "llama", "empty.txt"], "the text has 0 tokens"),
    (["score", "llama", "gone.txt"], "gone.txt cannot be read: No such file or directory"),
    (["score", "llama", "nothing"], "nothing cannot be read: Is a directory"),
    (["score", "llama", "latin.txt"], "latin.txt is not UTF-8 (byte 3)"),
    (["score", "bert", "texts.txt"], "only a decoder has a perplexity"),
    (["score", "gpt2", "texts.txt", "--context", "65"], "a context of 65 is more than the model's 64 positions"),
    (["score", "gpt2", "texts.txt", "--stride", "0"], "a stride lies between 1 and the context, 64; it is 0"),
    (["convert", "llama", "new", "--type", "F16"], "--type belongs to a .gguf file and --dtype to a directory"),
    (["convert", "llama", "new.gguf", "--dtype", "bf16"], "--type belongs to a .gguf file and --dtype to a directory"),
    (["convert", "llama", "new.bin"], "new.bin is neither a directory"),
    (["convert", "llama", "texts.txt"], "texts.txt exists"),
    (["convert", "llama", "bert"], "bert exists and is not an empty folder"),
    (["convert", "bert", "new", "--set", "model_type"], "--set takes a key of config.json and its value"),
    (["diff", "llama", "gone"], "'gone' is no run, recipe, preset, file or name to pull"),
    (["look", "llama"], "llama is no run, of which there would be a report: give a text"),
    (["look", "bert", "a name", "--out", "texts.txt"], "texts.txt is a file: --out names the folder of the pictures"),
    (["look", "bert", "a name", "--out", "texts.txt/new"], "the folder texts.txt/new cannot be made (Not a directory)"),
    (["generate", "x" * 300, "a name"], "is no file, no folder and no name to pull"),
    (["look", "bert", "a name", "--layer", "3", "--out", "new"], "there is no layer 3: the model has layers 1 to 2"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(a)[:60] for a, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_leaves_nothing(qkv, folder, arguments, words):
    before = sorted(os.listdir(folder))
    done = qkv(*arguments, stdin="Hi\n")
    *facts, said = done.err.splitlines()
    assert (done.code, done.out) == (2, "")
    assert said.startswith("qkv: ") and words in said
    assert all(line.endswith(("parameters, float32", "parameters, bfloat16")) for line in facts)
    assert sorted(os.listdir(folder)) == before


def test_input_that_is_not_utf8(qkv):
    for arguments in (["generate", "llama", "-"], ["embed", "vectors", "-"]):
        done = qkv(*arguments, stdin=b"na\xefve")
        assert done.code == 2 and done.err.endswith("qkv: standard input is not UTF-8 (byte 3)\n")


def test_a_checkpoint_of_a_run_is_no_published_one(qkv, tmp_path):
    from qkv.checkpoints.weights import save_model
    from tests.contracts.specs import decoder

    spec = decoder()
    (tmp_path / "step").mkdir()
    save_model(spec.build(), tmp_path / "step")
    done = qkv("generate", tmp_path / "step", "x")
    assert done.code == 2 and "step is a checkpoint without a tokenizer: name the run that it is a part of" in done.err
    assert "made of the same parts" in qkv("diff", tmp_path / "step", tmp_path / "step").out
    assert qkv("convert", tmp_path / "step", tmp_path / "new").err == done.err


def test_as_a_program_of_its_own(folder):
    """Once through the shell's eyes: results on stdout, the rest on stderr, and the reader may leave."""
    command = [sys.executable, "-c", "from qkv.cli import main; main()", "generate", "llama", "name", "--tokens", "300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, cwd=folder, env=environment)
    assert done.returncode == 0 and done.stdout.endswith(b"\n") and b"parameters" in done.stderr
    assert b"parameters" not in done.stdout


def test_an_adapter_is_added_to_the_model(qkv, folder: Path, tmp_path: Path) -> None:
    task = open_published(folder / "llama")
    add_lora(task.model, "mine", rank=2, alpha=4.0, targets="**.attn.f.q")
    for lora in loras(task.model, "mine").values():
        torch.nn.init.normal_(lora.B, std=0.3)
    save_adapter(task.model, tmp_path / "lora", "mine")
    wanted = score(task, (folder / "texts.txt").read_text(), context=16, stride=8)
    options = ("score", "llama", "texts.txt", "--context", 16, "--stride", 8, "--json")
    plain, adapted = (qkv(*options, *more).lines[0] for more in ((), ("--adapter", tmp_path / "lora")))
    assert adapted["perplexity"] == pytest.approx(wanted.perplexity, rel=1e-5)
    assert abs(plain["perplexity"] / adapted["perplexity"] - 1) > 1e-3
    task = open_published(folder / "llama")
    for name in ("a", "b"):  # of one name, in two folders
        add_lora(task.model, name, rank=2, alpha=4.0, targets="**.attn.f.q")
        save_adapter(task.model, tmp_path / name / "keys", name)
    both = ("--adapter", tmp_path / "a" / "keys", "--adapter", tmp_path / "b" / "keys")
    assert qkv(*options, *both).lines[0]["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)
    gone = qkv(*options, "--adapter", tmp_path / "gone")
    assert gone.code == 2 and gone.err.count("\n") <= 2 and "gone" in gone.err
