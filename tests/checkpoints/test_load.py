"""Directories of the transformers package: what is read, what stays in the file, and what is refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qkv.checkpoints.directory import Directory, is_plain, read_sound
from qkv.checkpoints.load import Origin, load_directory
from qkv.checkpoints.weights import Unfilled
from qkv.errors import QkvError
from qkv.models import Module, Sequence
from qkv.parts import Pool
from qkv.parts.head import Vector
from qkv.spec import edit
from tests.zoo.parity import SIZES, rough

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PLACES = {
    "model.embed_tokens.weight": "embed.tokens.weight",
    "model.layers.1.self_attn.q_proj.weight": "stack.1.attn.f.q.weight",
    "model.layers.2.mlp.down_proj.weight": "stack.2.ffn.f.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, as the transformers package writes it."""
    folder = tmp_path_factory.mktemp("made")
    llama = rough(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2)))
    llama.save_pretrained(folder / "llama")
    llama.save_pretrained(folder / "shards", max_shard_size="20KB")
    llama.bfloat16().save_pretrained(folder / "bf16")
    rough(tf.BertForPreTraining(tf.BertConfig(**SIZES))).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def llama(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "llama", tmp_path / "llama")


def configure(folder: Path, **values: Any) -> None:
    """Set keys of config.json; None takes one out."""
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Set tensors of the file; None takes one out."""
    held = {
        **{name: x.clone() for name, x in load_file(folder / WEIGHTS).items()},
        **tensors,
    }  # not from the mapped file
    save_file({name: x for name, x in held.items() if x is not None}, folder / WEIGHTS, {"format": "pt"})


def mapped(model: Module, folder: Path) -> list[str]:
    """The parameters whose numbers stand in memory that is mapped from a file of the folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return [name for name, x in model.named_parameters() if any(a <= x.data_ptr() < b for a, b in spans)]


# --- what is read ---


def test_every_tensor_of_the_file_becomes_its_parameter(made: Path) -> None:
    model, file = load_directory(made / "llama"), load_file(made / "llama" / WEIGHTS)
    state = model.state_dict()
    assert all(torch.equal(file[theirs], state[ours]) for theirs, ours in PLACES.items())
    assert len(file) == len(state) and not model.training
    assert not any(x.is_meta for x in model.state_dict().values())


def test_nothing_is_copied(made: Path) -> None:
    for name in ("llama", "shards", "bert"):
        model = load_directory(made / name)
        assert mapped(model, made / name) == [name for name, _ in model.named_parameters()]
    copied = load_directory(made / "llama", torch.float64)
    assert mapped(copied, made / "llama") == []


def test_shards_are_one_model(made: Path) -> None:
    names = json.loads((made / "shards" / INDEX).read_text())["weight_map"]
    assert len(set(names.values())) > 2
    whole, parts = load_directory(made / "llama").state_dict(), load_directory(made / "shards").state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_one_whole_file_counts_before_an_index(llama: Path) -> None:
    (llama / INDEX).write_text("not read")
    assert load_directory(llama).count() > 0


def test_weights_have_the_files_dtype_or_the_one_asked_for(made: Path) -> None:
    plain, half = load_directory(made / "llama"), load_directory(made / "bf16")
    asked = load_directory(made / "llama", torch.bfloat16)
    assert {x.dtype for x in half.parameters()} == {x.dtype for x in asked.parameters()} == {torch.bfloat16}
    assert mapped(half, made / "bf16") and not mapped(asked, made / "llama")
    for (name, x), y, z in zip(plain.named_parameters(), half.parameters(), asked.parameters(), strict=True):
        assert torch.equal(x.bfloat16(), y) and torch.equal(y, z), name


def test_of_several_dtypes_the_most_frequent_counts(llama: Path) -> None:
    x = load_file(llama / WEIGHTS)["lm_head.weight"]
    rewrite(llama, **{"lm_head.weight": x.half()})
    model = load_directory(llama)
    assert Directory(llama).dtype == torch.float32 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()["head.weight"], x.half().float())


def test_a_dtype_asked_for_that_the_file_has_costs_nothing(made: Path) -> None:
    assert mapped(load_directory(made / "llama", torch.float32), made / "llama")


def test_the_origin_keeps_what_the_model_has_no_part_for(made: Path) -> None:
    model, file = load_directory(made / "bert"), load_file(made / "bert" / WEIGHTS)
    origin = model.origin
    assert isinstance(origin, Origin) and origin.spec == model.spec
    kept = origin.kept(model.spec)
    assert sorted(kept) == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "cls.seq_relationship.bias", "cls.seq_relationship.weight"
    ]  # fmt: skip
    assert all(torch.equal(x, file[name]) for name, x in kept.items())
    assert origin.kept(edit(edit(model.spec, "width", 42), "**.heads", 7)) == {}


def test_tensors_that_can_be_computed_are_passed_over(llama: Path) -> None:
    rewrite(llama, **{f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(3) for n in range(3)})
    model = load_directory(llama)
    assert len(model.origin.plan.derived) == 3 and not model.origin.kept(model.spec)


def test_a_tied_head_may_be_said_twice_if_it_is_equal(llama: Path) -> None:
    table = load_file(llama / WEIGHTS)["model.embed_tokens.weight"]
    configure(llama, tie_word_embeddings=True)
    with pytest.raises(QkvError, match=r"lm_head\.weight differs from embed\.tokens\.weight, with which the config"):
        load_directory(llama)
    rewrite(llama, **{"lm_head.weight": table.clone()})
    assert "head.weight" not in load_directory(llama).state_dict()
    rewrite(llama, **{"lm_head.weight": None})
    assert "head.weight" not in load_directory(llama).state_dict()


@pytest.mark.parametrize(("modules", "unit"), [(["Transformer", "Pooling"], False),
                                               (["Transformer", "Pooling", "Normalize"], True)])  # fmt: skip
def test_a_pooling_beside_a_bare_model_becomes_its_head(
    modules: list[str], unit: bool, made: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vectors"
    rough(tf.BertModel(tf.BertConfig(**SIZES), add_pooling_layer=False)).save_pretrained(folder)
    paths = ["", "1_Pooling", "2_Normalize"]
    chain = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in zip(modules, paths, strict=False)
    ]
    (folder / "modules.json").write_text(json.dumps(chain))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_max_tokens": true, "word_embedding_dimension": 36}'
    )
    model = load_directory(folder)
    assert isinstance(model.spec, Sequence) and model.spec.head == Vector(Pool("max"), unit=unit)


def test_fresh_weights_are_not_drawn_on_the_way() -> None:
    x = torch.zeros(3)
    with Unfilled():
        x.normal_().uniform_()
        nn.init.normal_(nn.init.uniform_(nn.init.xavier_uniform_(x[None])))
        assert torch.equal(x + 1, torch.ones(3))
    assert torch.equal(x, torch.zeros(3)) and not torch.equal(x.normal_(), torch.zeros(3))


# --- what is refused ---


def refused(folder: Path) -> str:
    with pytest.raises(QkvError) as fault:
        load_directory(folder)
    return str(fault.value).replace(str(folder), "HERE")


def test_a_missing_tensor_is_named(llama: Path) -> None:
    rewrite(llama, **{"model.layers.1.mlp.up_proj.weight": None})
    said = "HERE is no llama model of this configuration: it lacks model.layers.1.mlp.up_proj.weight"
    assert refused(llama) == said


def test_a_tensor_too_many_is_named(llama: Path) -> None:
    rewrite(llama, **{"model.layers.1.mlp.up_proj.lora": torch.zeros(2)})
    said = "HERE is no llama model of this configuration: nothing reads model.layers.1.mlp.up_proj.lora"
    assert refused(llama) == said


@pytest.mark.parametrize("shape", [(50, 35), (50, 36, 1), (49, 36), (50,), ()])
def test_another_shape_is_named_with_the_one_expected(shape: tuple[int, ...], llama: Path) -> None:
    rewrite(llama, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(shape)})
    said = "HERE: by the configuration stack.1.ffn.f.up.weight has the shape (50, 36), "
    assert refused(llama) == f"{said}model.layers.1.mlp.up_proj.weight makes it {shape}"


def test_whole_numbers_are_no_weights(llama: Path) -> None:
    rewrite(llama, **{"model.norm.weight": torch.ones(36, dtype=torch.int32)})
    assert refused(llama) == "HERE: model.norm.weight holds int32, where floating-point numbers are due"


def test_a_file_without_floating_point_numbers_is_none(llama: Path) -> None:
    save_file({name: x.to(torch.int32, copy=True) for name, x in load_file(llama / WEIGHTS).items()}, llama / WEIGHTS)
    assert refused(llama) == "HERE holds no tensor of floating-point numbers"


CONFIGURATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"rotary_magic": 2}, "has keys that this family does not know: 'rotary_magic'; ignoring them could "
                    "run another model than the one that was published"),
    "missing key": ({"hidden_size": None}, "lacks the key 'hidden_size'"),
    "a string for a number": ({"hidden_size": "36"}, ": hidden_size is '36', which is not of the type int"),
    "no divisor": ({"num_key_value_heads": 4}, ": 4 key-value heads do not divide 6 heads"),
    "unknown activation": ({"hidden_act": "gelu_neu"}, ": hidden_act is 'gelu_neu'; did you mean 'gelu_new'?"),
    "packed weights": ({"quantization_config": {"bits": 4}}, ": quantization_config is {'bits': 4}, for which qkv has "
                       "no part; it runs nothing"),
    "no model_type": ({"model_type": None}, " has no model_type, which says what model it is"),
    "layers that are not there": ({"num_hidden_layers": 100}, ": num_hidden_layers is 100; a whole number from 1 to 30 "
                                  "is expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_is_read_key_by_key(case: str, llama: Path) -> None:
    values, said = CONFIGURATIONS[case]
    configure(llama, **values)
    assert refused(llama) == f"HERE/config.json{said if said[0] in ': ' else ' ' + said}"


def test_fewer_layers_than_the_file_has_leave_tensors_over(llama: Path) -> None:
    configure(llama, num_hidden_layers=2)
    assert "nothing reads model.layers.2.input_layernorm.weight" in refused(llama)
    assert "and 5 more" in refused(llama)


def test_an_incomplete_folder_is_named(llama: Path) -> None:
    (llama / WEIGHTS).rename(llama / "elsewhere")
    assert (
        refused(llama)
        == "HERE has no model.safetensors beside its config.json: the folder is incomplete, copy it again"
    )
    (llama / "config.json").unlink()
    assert refused(llama) == "HERE/config.json does not exist: the folder is incomplete, copy it again"


@given(st.text(max_size=20) | st.sampled_from(["a", "..", "../a", "/a", "a/b", "\\", "\ud800", "a" * 256, "é" * 128]))
def test_a_plain_name_stays_in_its_folder(name: str) -> None:
    if is_plain(name):
        assert os.path.normpath(f"/folder/{name}") == f"/folder/{name}" and Path("/folder", name).name == name
        assert len(os.fsencode(name)) <= 255 and "\0" not in name


def test_a_json_file_is_read_up_to_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"weight_map": {f"model.layers.{n}.weight": "model.safetensors" for n in range(10**5)}}))
    assert len(read_sound(path)["weight_map"]) == 10**5
