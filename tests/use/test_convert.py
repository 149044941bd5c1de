"""From one form to another: the same numbers, the same texts, or one sentence and nothing written."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import qkv
from qkv.checkpoints.load import load_directory
from qkv.errors import QkvError
from qkv.ops.blocks.packed import Packed
from qkv.use import fidelity, open_published
from qkv.use.convert import convert
from qkv.use.fidelity import texts
from tests.use import small
from tests.use.small import SENTENCES
from tests.zoo.parity import relative

EVEN = {"hidden_size": 32, "intermediate_size": 64}


def says(*arguments: Any, **options: Any) -> str:
    return "\n".join(convert(*arguments, **options))


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return open_published(folder).model(torch.tensor([ids])).float()


@torch.no_grad()
def test_to_gguf_and_back(tmp_path: Path) -> None:
    theirs = small.llama(tmp_path / "a", chat=True)
    told = says(tmp_path / "a", tmp_path / "b.gguf", kind="F32")
    assert told.startswith(f"{tmp_path / 'b.gguf'}: ") and "tensors of type F32" in told and "\n" not in told
    told = says(tmp_path / "b.gguf", tmp_path / "c")
    assert told == f"{tmp_path / 'c'}: {theirs.num_parameters():,} parameters, float32"
    first, packed, back = (open_published(tmp_path / name) for name in ("a", "b.gguf", "c"))
    own, again = AutoTokenizer.from_pretrained(tmp_path / "a"), AutoTokenizer.from_pretrained(tmp_path / "c")
    messages = [{"role": "user", "content": "Hi"}]
    for task in (packed, back):
        assert task.target.ends == first.target.ends and task.frame == first.frame
        assert task.target.templates == first.target.templates
        for text in [*SENTENCES, "<|user|>", "naïve 東京\n\n  x"]:
            assert task.encode(text) == first.encode(text) and task.ids(text, parse=True) == first.ids(text, parse=True)
        ids = first.encode(SENTENCES[0])
        assert relative(task.model(torch.tensor([ids])), first.model(torch.tensor([ids]))) < 1e-5
        assert list(task.stream(ids, tokens=20)) == list(first.stream(ids, tokens=20))
    assert again(SENTENCES)["input_ids"] == own(SENTENCES)["input_ids"]
    rendered = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (own, again)]
    assert rendered[0] == rendered[1]
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "c").eval()
    assert relative(there(torch.tensor([ids])).logits, theirs(torch.tensor([ids])).logits) < 1e-5


@pytest.mark.parametrize(("kind", "far"), [("F16", 1e-2), ("BF16", 5e-2), ("Q8_0", 5e-2), ("Q4_0", 1.0)])
def test_each_type_of_gguf_is_near(kind: str, far: float, tmp_path: Path) -> None:
    small.llama(tmp_path / "a", **EVEN)
    assert f"tensors of type {kind}" in says(tmp_path / "a", tmp_path / "b.gguf", kind=kind)
    found, wanted = (logits(tmp_path / name, [0, 30, 40, 50]) for name in ("b.gguf", "a"))
    assert 0 < relative(found, wanted) < far
    # A file is written once more from what it holds: the same blocks.
    says(tmp_path / "b.gguf", tmp_path / "c.gguf", kind=kind)
    assert torch.equal(logits(tmp_path / "c.gguf", [0, 30, 40, 50]), found)


def test_rows_that_blocks_do_not_fit_are_named(tmp_path: Path) -> None:
    small.llama(tmp_path / "a")
    told = says(tmp_path / "a", tmp_path / "b.gguf", kind="Q8_0").splitlines()
    assert len(told) == 2 and told[1].startswith("  their rows are no multiple of a block: ") and "are F16" in told[1]
    assert relative(logits(tmp_path / "b.gguf", [0, 30, 40]), logits(tmp_path / "a", [0, 30, 40])) < 5e-2


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    small.llama(tmp_path / "a")
    small.tokenizer(small.unigrams(), eos_token="</s>").save_pretrained(tmp_path / "a")
    told = says(tmp_path / "a", tmp_path / "b.gguf")
    assert "the file has no tokenizer" in told and "Unigram" in told
    with pytest.raises(QkvError, match="b.gguf holds weights without a tokenizer"):
        open_published(tmp_path / "b.gguf")
    assert "it has no tokenizer, as the file has none" in says(tmp_path / "b.gguf", tmp_path / "c")
    before, after = qkv.load(tmp_path / "b.gguf").state_dict(), qkv.load(tmp_path / "c").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_16_bits(tmp_path: Path) -> None:
    theirs = small.llama(tmp_path / "a")
    told = says(tmp_path / "a", tmp_path / "b", dtype=torch.bfloat16)
    assert told == f"{tmp_path / 'b'}: {theirs.num_parameters():,} parameters, bfloat16"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b").dtype == torch.bfloat16
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(os.listdir(tmp_path / "a"))
    told = says(tmp_path / "b", tmp_path / "c")  # as it is
    assert told.endswith("bfloat16")


# --- pickles ---


def pickled(folder: Path, weights: Any = None) -> Any:
    """As it was done before safetensors, with a config.json that does not say what model it is."""
    theirs = small.bert(folder, "ForSequenceClassification")
    torch.save(theirs.state_dict() if weights is None else weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    return theirs


def test_a_pickle_is_converted_when_that_is_asked_for(tmp_path: Path) -> None:
    theirs, old, new = pickled(tmp_path / "old"), tmp_path / "old", tmp_path / "new"
    with pytest.raises(QkvError, match=r"pytorch_model.bin is a pickle, which can run code.*--allow-pickle"):
        says(old, new)
    with pytest.raises(QkvError, match="has no model_type, which says what model it is"):
        says(old, new, allow_pickle=True)
    assert not new.exists()
    says(old, new, allow_pickle=True, settings=["model_type=bert"])
    there = AutoModelForSequenceClassification.from_pretrained(new)
    assert all(torch.equal(x, there.state_dict()[name]) for name, x in theirs.state_dict().items())
    own, task = AutoTokenizer.from_pretrained(new), open_published(new)
    with torch.no_grad():
        p = theirs(torch.tensor([own(SENTENCES[0])["input_ids"]])).logits[0].softmax(-1)
    assert abs(task.predict(SENTENCES[:1])[0][0].score - float(p.max().log())) < 1e-5


@pytest.mark.parametrize(("setting", "words"), [
    ("model_type", "--set takes a key of config.json and its value, such as model_type=bert, not 'model_type'"),
    ("=bert", "--set takes a key of config.json and its value, such as model_type=bert, not '=bert'"),
    ("vocab_size=7", "says vocab_size = 400 itself; --set adds what it lacks"),
    ("model_type=bort", "does not know the model_type 'bort'; did you mean 'bert'"),
    ("model_type=3", "has no model_type"),
])  # fmt: skip
def test_a_setting_that_helps_nobody(setting: str, words: str, tmp_path: Path) -> None:
    pickled(tmp_path / "old")
    with pytest.raises(QkvError, match=words):
        says(tmp_path / "old", tmp_path / "new", allow_pickle=True, settings=[setting])
    assert os.listdir(tmp_path) == ["old"]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled(tmp_path / "old", {"bert.pooler.dense.weight": Evil()})
    with pytest.raises(
        QkvError, match="pytorch_model.bin holds more than weights: it asks for [a-z]*.mkdir, which is not run"
    ):
        says(tmp_path / "old", tmp_path / "new", allow_pickle=True, settings=["model_type=bert"])
    assert os.listdir(tmp_path) == ["old"]


def test_safetensors_are_read_before_pickles(tmp_path: Path) -> None:
    small.bert(tmp_path / "a")
    torch.save({"x": Evil()}, tmp_path / "a" / "pytorch_model.bin")
    assert says(tmp_path / "a", tmp_path / "b", allow_pickle=True).endswith("float32")


# --- weights of fewer bits ---


@pytest.mark.parametrize(("bits", "least"), [("int8", 0.97), ("int4", 0.6), ("bf16", 0.97)])
@torch.inference_mode()
def test_a_quantised_decoder_and_what_that_cost_it(bits: str, least: float, tmp_path: Path) -> None:
    theirs = small.llama(tmp_path / "a", chat=True, **EVEN)
    for x in theirs.parameters():
        x.mul_(0.3)
    theirs.save_pretrained(tmp_path / "a")
    first, second, third = says(tmp_path / "a", tmp_path / "b", bits=bits).splitlines()
    size = sum(x.numel() for x in theirs.parameters()) * 4 / 1e6
    assert first.startswith(f"{tmp_path / 'b'}: {theirs.num_parameters():,} parameters in ")
    assert first.endswith(f" MB, before in {size:,.1f} MB")
    assert second.startswith("  matrices: ") and "only qkv loads them" in second
    found = re.fullmatch(
        r"  perplexity ([\d.]+), before ([\d.]+); ([\d.]+)% of the likeliest tokens as before; "
        r"measured on 2,048 tokens of Python's documentation",
        third,
    )
    assert found is not None
    after, before, same = map(float, found.groups())
    # The same by hand, from transformers and from the weights that the blocks stand for.
    tasks, nats, best = [open_published(tmp_path / name) for name in "ab"], [0.0, 0.0], [[], []]
    read = texts(tasks[0])
    assert sum(len(row) - 1 for row in read) == 2048 and {len(row) for row in read[:-1]} == {256}
    assert all(row[0] == 0 for row in read)
    for row in read:
        ids = torch.tensor([row])
        for n, z in enumerate((theirs(ids).logits, tasks[1].model(ids))):
            nats[n] += float(F.cross_entropy(z[0, :-1], ids[0, 1:], reduction="sum"))
            best[n].append(z[0, :-1].argmax(-1))
    for told, one in ((before, nats[0]), (after, nats[1])):
        assert abs(told - math.exp(one / 2048)) < 0.01
    agree = float((torch.cat(best[0]) == torch.cat(best[1])).float().mean())
    assert abs(same / 100 - agree) < 2e-3 and least < agree < 1 and before != after
    assert tasks[0].target.templates == tasks[1].target.templates and tasks[1].target.ends == tasks[0].target.ends
    assert says(tmp_path / "b", tmp_path / "c") == f"{tmp_path / 'c'}: {theirs.num_parameters():,} parameters, float32"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert relative(plain(ids).logits, tasks[1].model(ids)) < 1e-5


@torch.inference_mode()
def test_a_quantised_encoder_keeps_its_directions(tmp_path: Path) -> None:
    small.bert(tmp_path / "a", **EVEN)
    said = says(tmp_path / "a", tmp_path / "b", bits="int4").splitlines()[-1]
    found = re.fullmatch(
        r"  hidden vectors with a mean cosine of ([\d.]+) to those before; measured on ([\d,]+) tokens of .*", said
    )
    assert found is not None
    one, two = (open_published(tmp_path / name) for name in "ab")
    cosines = torch.cat([
        F.cosine_similarity(*(task.model.hidden(torch.tensor([row]))[0] for task in (one, two))) for row in texts(one)
    ])  # fmt: skip
    assert abs(float(found[1]) - float(cosines.mean())) < 2e-5 and 0.9 < float(found[1]) < 1
    assert int(found[2].replace(",", "")) == len(cosines) and max(map(len, texts(one))) == one.room == 96


def test_a_quantised_encoder_decoder(tmp_path: Path) -> None:
    small.t5(tmp_path / "a", d_model=32, d_ff=64, d_kv=8)
    said = says(tmp_path / "a", tmp_path / "b", bits="int8").splitlines()[-1]
    assert re.fullmatch(r"  [\d.]+% of the likeliest tokens as before; measured on [\d,]+ tokens of .*", said)
    one, two = (open_published(tmp_path / name) for name in "ab")
    assert two.begin == one.begin and len(two.predict(SENTENCES, tokens=9)) == 4


def test_blocks_of_as_few_bits_are_not_rounded_again(tmp_path: Path) -> None:
    small.llama(tmp_path / "a", **EVEN)
    says(tmp_path / "a", tmp_path / "b.gguf", kind="Q4_0")
    said = says(tmp_path / "b.gguf", tmp_path / "c", bits="int4")
    assert "15 in Q4_0, 1 in Q8_0" in said and "100.0% of the likeliest" in said
    packed, kept = open_published(tmp_path / "b.gguf", packed=True).model, open_published(tmp_path / "c").model
    for name, x in packed.state_dict().items():
        if isinstance(x, Packed) and x.format == "Q4_0":
            assert torch.equal(kept.state_dict()[name].blocks, x.blocks)


def test_rows_that_no_block_fits_are_named(tmp_path: Path) -> None:
    small.gpt2(tmp_path / "a")
    said = says(tmp_path / "a", tmp_path / "b", bits="int4").splitlines()[-1]
    assert said.startswith("  as they were, with rows that are no multiple of 32: embed.tokens.weight, stack.0.attn")
    small.llama(tmp_path / "c")
    with pytest.raises(QkvError, match="would hold nothing packed: no row of the model's weights is a multiple of 32"):
        says(tmp_path / "c", tmp_path / "d", bits="int8")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_where_nothing_can_be_measured_that_is_said(tmp_path: Path) -> None:
    small.llama(tmp_path / "a", **EVEN)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "a" / name).unlink()
    said = says(tmp_path / "a", tmp_path / "b", bits="int8").splitlines()[-1]
    assert said.startswith("  the error was not measured: ") and "tokenizer" in said
    assert isinstance(load_directory(tmp_path / "b").wiring.embed.table, Packed)


def test_no_more_is_read_than_there_is_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small.llama(tmp_path, **EVEN)
    task = open_published(tmp_path)
    monkeypatch.setattr(fidelity, "SECONDS", -1.0)
    first = fidelity.read(task)
    assert len(first.texts) == 1 and first.tokens == 255
    again = fidelity.read(task, texts(task)[:3])
    assert len(again.texts) == 3 and again.tokens == 765  # what is given is read
    same = fidelity.read(task, first.texts)
    assert same.nats == first.nats and "100.0% of the likeliest" in fidelity.compared(task, first, same)


@pytest.mark.parametrize(("target", "bits", "words"), [
    ("b", "int3", "weights are quantised to int8, int8-channel, int4, bf16, not to 'int3'; did you mean 'int"),
    ("b.gguf", "int8", "--quantize writes a directory for qkv; for a .gguf file there is --type Q4_1"),
    ("a", "int8", "a exists and is not an empty folder"),
])  # fmt: skip
def test_what_cannot_be_quantised(target: str, bits: str, words: str, tmp_path: Path) -> None:
    small.llama(tmp_path / "a", **EVEN)
    with pytest.raises(QkvError, match=words):
        says(tmp_path / "a", tmp_path / target, bits=bits)
    assert os.listdir(tmp_path) == ["a"]


# --- targets ---


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    small.llama(tmp_path / "a")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "b.gguf").write_text("mine")
    (tmp_path / "c.gguf").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for target in ("a", "file", "b.gguf", "c.gguf", "full"):
        with pytest.raises(QkvError, match="exists"):
            says(tmp_path / "a", tmp_path / target)
    assert (tmp_path / "file").read_text() == (tmp_path / "b.gguf").read_text() == "mine"
    assert os.listdir(tmp_path / "full") == ["x"] and os.listdir(tmp_path / "c.gguf") == []
    (tmp_path / "empty").mkdir()
    assert "parameters" in says(tmp_path / "a", tmp_path / "empty")


@pytest.mark.parametrize(("target", "options", "words"), [
    ("b.bin", {}, "is neither a directory, which has no such suffix, nor a file that ends in .gguf"),
    ("b.safetensors", {}, "is neither a directory"),
    ("b.gguf", {"kind": "Q3_K"}, "weights can be written as F32, F16, .*, not as 'Q3_K'"),
    ("b.gguf", {"kind": "q8_0"}, "did you mean 'Q8_0'"),
])  # fmt: skip
def test_what_cannot_be_written(target: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    small.llama(tmp_path / "a")
    with pytest.raises(QkvError, match=words):
        says(tmp_path / "a", tmp_path / target, **options)
    assert os.listdir(tmp_path) == ["a"]


def test_a_name_may_hold_a_dot(tmp_path: Path) -> None:
    small.llama(tmp_path / "llama-0.1b")
    assert says(tmp_path / "llama-0.1b", tmp_path / "llama-0.1b-bf16", dtype=torch.bfloat16).endswith("bfloat16")


def test_a_family_that_gguf_lacks(tmp_path: Path) -> None:
    small.bart(tmp_path / "a")
    with pytest.raises(QkvError, match="GGUF"):
        says(tmp_path / "a", tmp_path / "b.gguf")
    assert os.listdir(tmp_path) == ["a"]
