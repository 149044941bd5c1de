"""The way back out: what the transformers package loads, and what is refused without a trace."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from qkv.checkpoints import export
from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.load import load_directory
from qkv.errors import QkvError
from qkv.masks import Full, Window
from qkv.models import Model, Module, Sequence
from qkv.parts import Branch, Mamba
from qkv.parts.head import Vector
from qkv.spec import edit
from qkv.zoo import spec_of
from tests.zoo.parity import SIZES, answer, published, relative, rough, texts

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rough(tf.BertForPreTraining(tf.BertConfig(**SIZES))).save_pretrained(folder / "bert")
    rough(tf.BertModel(tf.BertConfig(**SIZES))).save_pretrained(folder / "bare")
    rough(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2))).save_pretrained(folder / "llama")
    return folder


def small(name: str) -> Model:
    """A preset's spec at odd sizes, as someone would train it."""
    spec = spec_of(name)
    if name in ("smollm2-135m", "llama-3.2-1b", "qwen3-0.6b"):
        spec = edit(spec, "**.kv_heads", 1)
    for path, value in {"width": 36, "**.heads": 6, "**.f.hidden": 50, "stack.depth": 3, "embed.vocab": 61}.items():
        spec = edit(spec, path, value)
    return spec


def built(spec: Model, seed: int = 0) -> Module:
    """A model with weights that no published one has, in evaluation mode."""
    model, generator = spec.build(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn(x.shape, generator=generator) * 0.3)
    return model.eval()


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def configure(folder: Path, **values: Any) -> None:
    held = {**config(folder), **values}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


# --- what goes out ---


@pytest.mark.parametrize("name", ["bert-tiny", "smollm2-135m", "qwen3-0.6b", "gpt2"])
@torch.no_grad()
def test_a_model_trained_from_a_preset_is_one_that_transformers_loads(name: str, tmp_path: Path) -> None:
    ours = built(small(name))
    assert save_pretrained(ours, tmp_path / "out") == tmp_path / "out"
    auto = tf.AutoModelForMaskedLM if name.startswith("bert") else tf.AutoModelForCausalLM
    theirs, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids, _ = texts()
    assert relative(ours(ids), published(theirs.eval()(ids))) < 1e-5
    again = load_directory(tmp_path / "out")
    assert again.spec == ours.spec and torch.equal(again(ids), ours(ids))


@torch.no_grad()
def test_an_edited_model_goes_out_with_its_new_sizes(made: Path, tmp_path: Path) -> None:
    loaded = load_directory(made / "llama")
    spec = edit(edit(loaded.spec, "stack.depth", 2), "**.f.hidden", 44)
    ours = built(spec)
    ours.origin = loaded.origin
    save_pretrained(ours, tmp_path / "out")
    assert (config(tmp_path / "out")["num_hidden_layers"], config(tmp_path / "out")["intermediate_size"]) == (2, 44)
    ids, _ = texts()
    theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert relative(ours(ids), published(theirs(ids))) < 1e-5


def test_tensors_without_a_part_are_written_back_bit_for_bit(made: Path, tmp_path: Path) -> None:
    save_pretrained(load_directory(made / "bert"), tmp_path / "out")
    before, after = load_file(made / "bert" / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert "cls.seq_relationship.weight" in after and "bert.pooler.dense.bias" in after
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_of_another_width_drops_them(made: Path, tmp_path: Path) -> None:
    loaded = load_directory(made / "bert")
    ours = built(edit(loaded.spec, "width", 48))
    ours.origin = loaded.origin
    save_pretrained(ours, tmp_path / "out")
    dropped = load_file(made / "bert" / WEIGHTS).keys() - load_file(tmp_path / "out" / WEIGHTS).keys()
    assert dropped == {f"{name}.{leaf}" for name in ("bert.pooler.dense", "cls.seq_relationship")
                       for leaf in ("weight", "bias")}  # fmt: skip
    assert load_directory(tmp_path / "out").spec == ours.spec


@pytest.mark.parametrize("architectures", [["BertModel"], None])
@torch.no_grad()
def test_a_bare_model_goes_out_bare_even_if_nobody_named_its_class(
    architectures: Any, made: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(made / "bare", tmp_path / "in")
    configure(folder, architectures=architectures)
    ours = load_directory(folder)
    save_pretrained(ours, tmp_path / "out")
    before, after = load_file(folder / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys() and "embeddings.word_embeddings.weight" in after
    ids, _ = texts()
    theirs = tf.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert relative(answer(ours, ids), published(theirs(ids))) < 1e-5


def test_the_configuration_says_the_dtype_once(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "llama", tmp_path / "in")
    configure(folder, dtype=None, torch_dtype="float32", _name_or_path="somewhere", temperature=0.7)
    save_pretrained(load_directory(folder, torch.bfloat16), tmp_path / "out")
    after = config(tmp_path / "out")
    assert after["dtype"] == "bfloat16" and "torch_dtype" not in after and after["temperature"] == 0.7
    assert {x.dtype for x in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}


def test_a_tied_head_is_written_once(tmp_path: Path) -> None:
    save_pretrained(built(small("smollm2-135m")), tmp_path / "out")
    assert (
        "lm_head.weight" not in load_file(tmp_path / "out" / WEIGHTS)
        and config(tmp_path / "out")["tie_word_embeddings"]
    )


def test_the_files_of_the_tokenizer_go_along_and_no_others(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "bare", tmp_path / "in")
    (folder / "1_Pooling").mkdir()
    beside = {
        "tokenizer.json": "{1}",
        "vocab.txt": "a\n",
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "modules.json": json.dumps([{"type": "m.Transformer", "path": ""}, {"type": "m.Pooling", "path": "1_Pooling"}]),
    }
    others = {"evil.py": "x", "pytorch_model.bin": "x", "1_Pooling/evil.py": "x", "README.md": "x"}
    for name, text in {**beside, **others}.items():
        (folder / name).write_text(text)
    ours = load_directory(folder)
    assert isinstance(ours.spec, Sequence) and isinstance(ours.spec.head, Vector)
    save_pretrained(ours, tmp_path / "out")
    written = {
        str(path.relative_to(tmp_path / "out")): path for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert written.keys() == {CONFIG, WEIGHTS, *beside}
    assert all(written[name].read_text() == text for name, text in beside.items())
    assert load_directory(tmp_path / "out").spec == ours.spec


def test_an_empty_folder_may_be_there_already_and_its_parents_need_not(made: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model = load_directory(made / "llama")
    for folder in (tmp_path / "out", tmp_path / "a" / "b"):
        assert load_directory(save_pretrained(model, str(folder))).spec == model.spec


# --- what does not ---

STRANGE = {
    "a window in an encoder": edit(small("bert-tiny"), "**.attn.f.mask", Window(3)),
    "a recurrence": edit(small("smollm2-135m"), "**.attn.f", Mamba(inner=72, rank=3)),
    "one odd layer": edit(small("smollm2-135m"), "stack.1.ffn.f.hidden", 51),
    "a decoder that sees all": edit(small("smollm2-135m"), "mask", Full()),
    "three branches": edit(small("bert-tiny"), "stack.0", lambda block: type(block)(
        **block.branches, more=Branch(block.branches["ffn"].f))),
    "nothing published is wired so": small("gpt2") and spec_of("transformer-tiny"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_a_model_without_a_published_form_is_refused(case: str, tmp_path: Path) -> None:
    spec = STRANGE[case]
    model = spec.build() if isinstance(spec, Sequence) else edit(spec, "**.vocab", 61).build()
    with pytest.raises(QkvError) as fault:
        save_pretrained(model, tmp_path / "out")
    said = str(fault.value)
    assert said.startswith("no published family describes this model, so other tools cannot load it: ")
    assert said.isprintable() and 100 < len(said) < 500
    assert not list(tmp_path.iterdir())


def test_an_edit_that_its_family_cannot_say_is_refused(made: Path, tmp_path: Path) -> None:
    loaded = load_directory(made / "llama")
    ours = edit(loaded.spec, "stack.1.ffn.f.hidden", 51).build()
    ours.origin = loaded.origin
    with pytest.raises(QkvError, match=r"^no llama configuration says stack\.1\.ffn\.f\.hidden: 50 → 51$"):
        save_pretrained(ours, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["a full folder", "a file", "a hidden file"])
def test_what_is_there_is_never_written_over(there: str, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if there == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / ("mine" if there == "a full folder" else ".mine")).write_text("mine")
    said = f"{target} exists and is not an empty folder; name a new one"
    with pytest.raises(QkvError, match=f"^{re.escape(said)}$"):
        save_pretrained(load_directory(made / "llama"), target)
    assert [path.read_text() for path in (target, *target.glob("*")) if path.is_file()] == ["mine"]


def test_a_model_is_not_saved_over_the_file_that_it_is_mapped_from(made: Path) -> None:
    before = (made / "llama" / WEIGHTS).read_bytes()
    with pytest.raises(QkvError, match="exists and is not an empty folder"):
        save_pretrained(load_directory(made / "llama"), made / "llama")
    assert (made / "llama" / WEIGHTS).read_bytes() == before


class Fails:
    """A tokenizer whose disk is full."""

    def __init__(self, fault: Exception) -> None:
        self.fault = fault

    def save(self, path: Path) -> None:
        raise self.fault


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), ValueError("ours"), KeyboardInterrupt()])
def test_nothing_half_written_is_left(fault: Any, made: Path, tmp_path: Path) -> None:
    wanted = QkvError if isinstance(fault, OSError) else type(fault)
    with pytest.raises(wanted, match="No space left|ours|^$"):
        save_pretrained(load_directory(made / "llama"), tmp_path / "out", tokenizer=Fails(fault))
    assert not list(tmp_path.iterdir())


def test_nor_where_the_weights_do_not_fit_on_the_disk(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_tensors", full)
    said = f"{tmp_path / 'out'} could not be written (No space left on device); what was there before is untouched"
    with pytest.raises(QkvError, match=f"^{re.escape(said)}$"):
        save_pretrained(load_directory(made / "llama"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_sentence(made: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(QkvError, match="could not be written"):
        save_pretrained(load_directory(made / "llama"), tmp_path / "file" / "out")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
