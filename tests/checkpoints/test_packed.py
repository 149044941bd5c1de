"""Packed weights on disk: the same blocks, mapped; plain ones for others; and one sentence for what is damaged."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

import qkv
from qkv.adapt import add_lora, dequantise, quantise
from qkv.checkpoints import export
from qkv.checkpoints.export import save_packed, save_pretrained
from qkv.checkpoints.gguf_export import save_gguf
from qkv.checkpoints.load import load_directory
from qkv.checkpoints.packed import TABLE
from qkv.checkpoints.weights import load_model, save_model
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.blocks.packed import Packed
from tests.zoo.parity import SIZES, relative, rough

WEIGHTS, PACKED, CONFIG = "model.safetensors", "packed.safetensors", "config.json"
EVEN: dict[str, Any] = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GPT2: dict[str, Any] = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 40}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**EVEN, num_key_value_heads=2)),
    "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**EVEN, tie_word_embeddings=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),  # whose file has its matrices transposed
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**EVEN, num_key_value_heads=2, num_local_experts=3)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**EVEN, pad_token_id=0)),  # whose file joins q, k and v
    "bert": lambda: tf.BertForPreTraining(tf.BertConfig(**EVEN)),  # of which a head is not ours, and is kept
}
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def answer(model: Module) -> Tensor:
    return model(IDS)


def made(name: str, folder: Path, kind: str = "int4") -> Module:
    """A model that was loaded from a published directory and quantised."""
    rough(MODELS[name](), std=0.1).save_pretrained(folder / "plain")
    model = load_directory(folder / "plain")
    quantise(model, kind)
    return model


def packed(model: Module) -> dict[str, Packed]:
    return {name: x for name, x in model.state_dict().items() if isinstance(x, Packed)}


def alike(one: Module, other: Module) -> None:
    """The same spec, and the same tensors, bit for bit and kept alike."""
    assert one.spec == other.spec
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for name, x in a.items():
        assert type(x) is type(b[name]) and x.dtype == b[name].dtype
        if isinstance(x, Packed):
            assert x.format == b[name].format and torch.equal(x.blocks, b[name].blocks)
        else:
            assert torch.equal(x, b[name])


def mapped(model: Module, path: Path) -> bool:
    """Whether all packed weights lie in the file, and nowhere else in memory."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            low, _, high = line.split()[0].partition("-")
            ranges.append((int(low, 16), int(high, 16)))
    starts = [x.blocks.data_ptr() for x in packed(model).values()]
    return bool(starts) and all(any(low <= at < high for low, high in ranges) for at in starts)


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_comes_back_as_it_was_packed(name: str, kind: str, tmp_path: Path) -> None:
    model = made(name, tmp_path, kind)
    save_packed(model, tmp_path / "packed")
    back = load_directory(tmp_path / "packed")
    alike(back, model)
    assert mapped(back, tmp_path / "packed" / PACKED)
    assert torch.equal(answer(back), answer(model))
    config = json.loads((tmp_path / "packed" / CONFIG).read_text())
    assert config["quantization_config"] == {"quant_method": "qkv"} and config["dtype"] == "float32"
    found = load_file(tmp_path / "packed" / PACKED)
    assert {key for key, x in found.items() if x.dtype == torch.uint8} == packed(model).keys()
    save_packed(back, tmp_path / "again")
    assert (tmp_path / "again" / PACKED).read_bytes() == (tmp_path / "packed" / PACKED).read_bytes()


@pytest.mark.parametrize("name", MODELS)
def test_others_get_plain_weights(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path)
    save_packed(model, tmp_path / "packed")
    back = load_directory(tmp_path / "packed")
    for number, one in enumerate((model, back)):
        folder = save_pretrained(one, tmp_path / f"out{number}")
        assert "quantization_config" not in json.loads((folder / CONFIG).read_text())
        again = load_directory(folder)
        assert not packed(again) and relative(answer(again), answer(model)) < 1e-5
    if name != "bert":
        theirs = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out1").eval()
        with torch.no_grad():
            assert relative(answer(back), theirs(IDS).logits) < 1e-4
    with pytest.raises(OSError, match="no file named model.safetensors"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_in_another_dtype(tmp_path: Path) -> None:
    save_packed(made("llama", tmp_path), tmp_path / "packed")
    half = load_directory(tmp_path / "packed", torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16} and mapped(half, tmp_path / "packed" / PACKED)
    assert answer(half).dtype == torch.bfloat16
    save_packed(half, tmp_path / "half")
    alike(load_directory(tmp_path / "half"), half)


def test_a_model_of_no_family_keeps_its_blocks_in_qkvs_own_form(tmp_path: Path) -> None:
    published = made("llama", tmp_path)
    model = published.spec.build().eval()
    model.load_state_dict(published.state_dict(), assign=True)
    assert model.origin is None
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        model.to(dtype)
        save_packed(model, tmp_path / f"own{number}")
        assert sorted(os.listdir(tmp_path / f"own{number}")) == [WEIGHTS, "spec.json"]
        back = load_model(tmp_path / f"own{number}")
        alike(back, model)
        assert mapped(back, tmp_path / f"own{number}" / WEIGHTS) and torch.equal(answer(back), answer(model))
    assert qkv.load(tmp_path / "own0", torch.bfloat16, packed=True).device.type == "cpu"
    (tmp_path / "more").mkdir()
    save_model(model, tmp_path / "more")
    assert (tmp_path / "more" / WEIGHTS).read_bytes() == (tmp_path / "own1" / WEIGHTS).read_bytes()


def test_what_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tmp_path)
    with pytest.raises(QkvError, match="plain exists and is not an empty folder"):
        save_packed(model, tmp_path / "plain")
    add_lora(model, "a", rank=2, alpha=2, targets="**.q")
    with pytest.raises(QkvError, match="the model has the adapter 'a'"):
        save_packed(model, tmp_path / "out")
    model = load_directory(tmp_path / "plain")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(export, "save_tensors", full)
    with pytest.raises(QkvError, match="No space left"):
        save_packed(model, tmp_path / "out")
    assert os.listdir(tmp_path) == ["plain"]


# --- asking for packed weights ---


def test_packed_weights_are_kept_where_there_are_some(tmp_path: Path) -> None:
    model = made("llama", tmp_path, "int8")
    save_packed(model, tmp_path / "packed")
    dequantise(model)
    save_gguf(model, tmp_path / "m.gguf", type="Q8_0")
    assert not packed(qkv.load(tmp_path / "m.gguf"))
    kept = qkv.load(tmp_path / "m.gguf", packed=True)
    assert len(packed(kept)) == 23 and relative(answer(kept), answer(model)) < 1e-5
    assert {x.dtype for x in qkv.load(tmp_path / "m.gguf", "bf16", packed=True).parameters()} == {torch.bfloat16}
    for asked in ({}, {"packed": True}):
        alike(qkv.load(tmp_path / "packed", **asked), load_directory(tmp_path / "packed"))
    (tmp_path / "own").mkdir()
    save_model(model, tmp_path / "own")
    for plain in ("plain", "own"):
        with pytest.raises(QkvError, match=f"{plain} keeps no weights packed: `qkv convert .* NEW --quantize int8`"):
            qkv.load(tmp_path / plain, packed=True)


# --- damage ---


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, str]], Any]) -> None:
    """Change the header of a file, and in it the table of formats."""
    said, data = header(path)
    table = json.loads(said["__metadata__"][TABLE])
    made = change(said, table)
    said["__metadata__"][TABLE] = made if isinstance(made, str) else json.dumps(table)
    text = json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


HEAD, NORM = "head.weight", "norm.weight"


def said_of(table: dict[str, Any], name: str, format: Any) -> None:
    table[name] = format


DAMAGE: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "no json": (lambda _, table: "{", "its table of packed weights is not sound JSON"),
    "no table": (lambda _, table: "[1]", "its table of packed weights says"),
    "twice": (lambda _, table: '{"a": "Q8_0", "a": "Q4_1"}', "gives the key 'a' twice"),
    "deep": (lambda _, table: "[" * 9999, "its table of packed weights is not sound JSON"),
    "half a letter": (lambda _, table: '{"\\ud800": "Q8_0"}', "is not sound JSON"),
    "a format of nobody": (lambda _, table: said_of(table, HEAD, "Q9_9"), "says 'Q9_9', which is no format of blocks"),
    "no format": (lambda _, table: said_of(table, HEAD, ["Q8_0"]), "which is no format of blocks"),
    "another format": (lambda _, table: said_of(table, HEAD, "Q4_1"), "'head.weight' is no matrix in blocks of Q4_1"),
    "another width": (lambda _, table: said_of(table, HEAD, "BF16"), "head.weight"),
    "no bytes": (lambda _, table: said_of(table, NORM, "Q8_0"), "'norm.weight' is no matrix in blocks of Q8_0"),
    "lost": (lambda _, table: table.pop(HEAD) and None, "head.weight.*holds.*uint8|'head.weight' has the shape"),
    "too many": (lambda _, table: said_of(table, "x", "Q8_0"), "lacks 'x', which its table of packed weights names"),
}


@pytest.mark.parametrize("form", ["published", "own"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_table_is_one_sentence(damage: str, form: str, tmp_path: Path) -> None:
    model = made("llama", tmp_path, "int8")
    model.origin = model.origin if form == "published" else None
    save_packed(model, tmp_path / "packed")
    change, words = DAMAGE[damage]
    rewritten(tmp_path / "packed" / (PACKED if form == "published" else WEIGHTS), change)
    with pytest.raises(QkvError, match=words) as fault:
        qkv.load(tmp_path / "packed")
    assert str(fault.value).startswith(str(tmp_path / "packed")) and "\n" not in str(fault.value)
    assert len(str(fault.value)) < 600


def test_a_folder_that_does_not_hold_together(tmp_path: Path) -> None:
    save_packed(made("llama", tmp_path), tmp_path / "packed")
    weights, config = tmp_path / "packed" / PACKED, tmp_path / "packed" / CONFIG
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-100])
    with pytest.raises(QkvError, match="is damaged or cut off"):
        qkv.load(tmp_path / "packed")
    weights.write_bytes(whole)
    values = json.loads(text)
    config.write_text(json.dumps({**values, "num_hidden_layers": 4}))
    with pytest.raises(QkvError, match="packed: it lacks stack.3.attn.f.q.weight"):
        qkv.load(tmp_path / "packed")
    config.write_text(json.dumps({**values, "intermediate_size": 128}))
    with pytest.raises(QkvError, match="by the configuration stack.0.ffn.f.gate.weight has the shape"):
        qkv.load(tmp_path / "packed")
    config.write_text(json.dumps({**values, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(QkvError, match="packed has no model.safetensors beside its config.json"):
        qkv.load(tmp_path / "packed")
    weights.rename(tmp_path / "packed" / WEIGHTS)
    with pytest.raises(QkvError, match="quantization_config is .*gptq.*, for which qkv has no part"):
        qkv.load(tmp_path / "packed")
    config.write_text(text)
    with pytest.raises(QkvError, match="packed has no packed.safetensors beside its config.json"):
        qkv.load(tmp_path / "packed")
    del values["quantization_config"]
    config.write_text(json.dumps(values))  # the names are not the family's
    with pytest.raises(QkvError, match="is no llama model of this configuration"):
        qkv.load(tmp_path / "packed")
