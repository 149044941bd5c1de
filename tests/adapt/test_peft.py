"""LoRA directories against the peft package, on models of the transformers package with large random weights."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qkv.adapt import add_lora, load_adapter, lora_state, loras, merge, save_adapter
from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.load import load_directory
from qkv.errors import QkvError
from qkv.models import Module
from tests.zoo.parity import SIZES, answer, loaded, published, relative, rough, texts

GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2: dict[str, Any] = {"vocab_size": 61, "n_positions": 97, "n_embd": 36, "n_layer": 2, "n_head": 6, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip


def base(name: str) -> PreTrainedModel:
    made: dict[str, Any] = {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
        "bare llama": lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
        "bare bert": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
        "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**SIZES, embedding_size=10)),
        "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
        "neox": lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(**{**SIZES, "num_attention_heads": 3, "rotary_pct": 0.5})
        ),
    }
    return rough(made[name]())


THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 7, "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.3}),
    ("llama", {"target_modules": r".*\.(o|down)_proj"}),
    ("llama", {"target_modules": ["q_proj", "k_proj", "up_proj"], "layers_to_transform": [1],
               "rank_pattern": {"mlp.up_proj": 2}, "alpha_pattern": {r"layers.\d+.self_attn.q_proj": 31}}),
    ("bare llama", {"target_modules": ["q_proj", "gate_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True, "lora_alpha": 9}),
    ("bert", {"target_modules": ["query", "dense"]}),
    ("bare bert", {"target_modules": ["value", "intermediate.dense"]}),
    ("albert", {"target_modules": ["query", "ffn"]}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "rank_pattern": {"qkv_proj": 5}}),
    ("neox", {"target_modules": ["query_key_value"]}),
]  # fmt: skip


def random(parameters: Iterator[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.2, generator=generator)


def written(name: str, folder: Path, **config: Any) -> peft.PeftModel:
    """A model of transformers and its adapter, in which nothing is zero, as peft saves them."""
    theirs = base(name)
    theirs.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 3, **config})).eval()
    random(parameter for key, parameter in adapted.named_parameters() if "lora_" in key)
    adapted.save_pretrained(str(folder / "adapter"))
    return adapted


def ours(folder: Path) -> Module:
    return load_directory(folder / "base")


@pytest.mark.parametrize(("name", "config"), THEIRS)
@torch.no_grad()
def test_what_peft_wrote_computes_the_same_here_and_goes_back_as_it_came(
    name: str, config: dict[str, Any], tmp_path: Path
) -> None:
    theirs, model = written(name, tmp_path, **config), ours(tmp_path)
    ids, _ = texts()
    plain, wanted = answer(model, ids), published(theirs(ids))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_adapter(model, tmp_path / "adapter")
    assert relative(plain, wanted) > 0.05
    assert relative(answer(model, ids), wanted) < 1e-5
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {f"base_model.model.{module}.lora_A.weight" for module in report.layers.values()} <= set(tensors)
    assert report.layers.keys() == loras(model, "default").keys()
    assert report.ranks == tuple(sorted({min(tensor.shape) for tensor in tensors.values()}))

    save_adapter(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())
    assert relative(published(applied(name, tmp_path / "again")(ids)), wanted) < 1e-6

    with pytest.raises(QkvError):
        save_pretrained(model, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    merge(model)
    assert relative(answer(model, ids), wanted) < 1e-5
    save_pretrained(model, tmp_path / "whole")
    assert relative(published(type(base(name)).from_pretrained(tmp_path / "whole").eval()(ids)), wanted) < 1e-5


def applied(name: str, adapter: Path) -> peft.PeftModel:
    """The adapter on a fresh copy of the model; peft warns of what it misses, which fails here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base(name), str(adapter)).eval()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "**.attn.f.{q,v}"),
        ("bare llama", ["stack.1.**"]),
        ("gpt2", ["**.attn.f.{q,v}", "**.ffn.f.up"]),
        ("gpt2", "stack.*.attn.f.o"),
        ("bert", ["**.attn.f.{q,k}", "**.ffn.f.*", "head.**"]),
        ("phi3", "**.f.*"),
        ("neox", "**.attn.f.{k,v}"),
        ("albert", "**.attn.f.*"),
    ],
)
@pytest.mark.parametrize("stabilised", [False, True])
@torch.no_grad()
def test_what_we_write_computes_the_same_in_peft(
    name: str, targets: str | list[str], stabilised: bool, tmp_path: Path
) -> None:
    model = loaded(base(name), tmp_path / "base")
    add_lora(model, "mine", rank=4, alpha=6.5, targets=targets, stabilised=stabilised)
    random(parameter for lora in loras(model, "mine").values() for parameter in lora.parameters())
    save_adapter(model, tmp_path / "adapter", "mine")
    ids, _ = texts()
    wanted = answer(model, ids)
    theirs = applied(name, tmp_path / "adapter")
    assert relative(published(theirs(ids)), wanted) < 1e-5
    again = ours(tmp_path)
    load_adapter(again, tmp_path / "adapter", "mine")
    assert relative(answer(again, ids), wanted) < 1e-5
    covered = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert {key.replace(".default", "") for key in theirs.state_dict() if "lora_" in key} == covered


def test_names_are_the_shortest_that_say_it(tmp_path: Path) -> None:
    model = loaded(base("gpt2"), tmp_path / "base")
    add_lora(model, "one", rank=2, alpha=2, targets=["**.attn.f.o", "**.ffn.f.up", "stack.0.ffn.f.down"])
    save_adapter(model, tmp_path / "out", "one")
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert values["target_modules"] == ["0.mlp.c_proj", "attn.c_proj", "c_fc"]
    assert values["fan_in_fan_out"] is True and values["task_type"] == "CAUSAL_LM"


@torch.no_grad()
def test_several_stand_beside_one_another_and_old_files_name_theirs(tmp_path: Path) -> None:
    theirs, model = written("llama", tmp_path, target_modules=["q_proj"]), ours(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    older = {key.replace(".weight", ".default.weight"): x for key, x in load_file(file).items()}
    save_file(older, file)
    ids, _ = texts()
    load_adapter(model, tmp_path / "adapter", "one")
    assert relative(answer(model, ids), published(theirs(ids))) < 1e-5
    load_adapter(model, tmp_path / "adapter", "two")
    twice = {key: 2 * x if ".lora_B." in key else x for key, x in theirs.state_dict().items()}
    theirs.load_state_dict(twice)
    assert relative(answer(model, ids), published(theirs(ids))) < 1e-5
    matrices = [x.data_ptr() for name in ("one", "two") for x in lora_state(model, name).values()]
    assert len(set(matrices)) == len(matrices)


# --- what is refused ---


def changed(folder: Path, **values: Any) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors(folder: Path, **changes: Tensor | None) -> None:
    """Add tensors to the file, or take them away (None); `q_` stands for one of its modules."""
    path = folder / "adapter" / "adapter_model.safetensors"
    found = {**load_file(path), **{re.sub("^q_", Q, key): x for key, x in changes.items()}}
    save_file({key: x for key, x in found.items() if x is not None}, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["score"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"new_trick": 1}, "'new_trick'"),
        ({"r": 10**12}, "r is 1000000000000"),
        ({"r": 10**9}, "by adapter_config.json the rank is 1000000000"),
        ({"r": "3"}, "not of the type int"),
        ({"r": None}, "lacks the key 'r'"),
        ({"rank_pattern": {"q_proj": 4}}, "the rank is 4"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern has the key"),
        ({"rank_pattern": {"a**": 4}}, "rank_pattern has the key"),
        ({"rank_pattern": {r"layers\.(0|1)\.self_attn\.[qk]_proj": 4}}, "the rank is 4"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": ["k_proj"]}, "target_modules of adapter_config.json does not name"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(values: dict[str, Any], said: str, llama: Path) -> None:
    changed(llama, **values)
    refused(llama, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q_A.weight": torch.zeros(3, 35)}, r"lead from 35 features to 36, and the model's own from 36 to 36"),
        ({"q_B.weight": torch.zeros(30, 3)}, r"lead from 36 features to 30"),
        ({"q_B.weight": torch.zeros(36, 4)}, r"\(3, 36\) and \(36, 4\), and by adapter_config.json the rank is 3"),
        ({"q_A.weight": torch.zeros(3)}, r"\(3,\) and \(36, 3\)"),
        ({"q_A.weight": torch.zeros(3, 36, dtype=torch.int32)}, "neither A nor B"),
        ({"q_A.other.weight": torch.zeros(3, 36)}, "neither A nor B"),
        ({"q_B.weight": None}, "only one of the two"),
        ({"base_model.model.score.weight": torch.zeros(2, 36)}, "neither A nor B"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 61)}, "neither A nor B"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Tensor | None], said: str, llama: Path) -> None:
    tensors(llama, **changes)
    refused(llama, said)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("model.layers.7.self_attn.q_proj", "adapts model.layers.7.self_attn.q_proj, which this llama model"),
        ("transformer.h.0.attn.c_attn", "which this llama model does not have"),
        ("lm_head", "adapts lm_head, here head, which is no Linear"),
    ],
)
def test_modules_that_take_none_are_refused(module: str, said: str, llama: Path) -> None:
    changed(llama, target_modules="all-linear")
    stem = f"base_model.model.{module}.lora_"
    tensors(llama, **{f"{stem}A.weight": torch.zeros(3, 36), f"{stem}B.weight": torch.zeros(36, 3)})
    refused(llama, said)


def test_broken_files_are_refused(llama: Path) -> None:
    path = llama / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-5], content[:20], b"", b"\xff" * 50):
        path.write_bytes(damaged)
        refused(llama, "damaged or cut off")
    path.rename(path.with_suffix(".bin"))
    refused(llama, "is a pickle")
    path.with_suffix(".bin").unlink()
    refused(llama, "does not exist")
    config = llama / "adapter" / "adapter_config.json"
    sound = config.read_text()
    for content, said in {
        "[]": "no table of keys",
        sound.replace("{", '{"r": 1,', 1): "gives the key 'r' twice",
        " " * 2**24 + sound: "is longer than 16,777,216 bytes",
    }.items():
        config.write_text(content)
        refused(llama, said)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    written("llama", tmp_path, target_modules=["q_proj"])
    return tmp_path


def refused(folder: Path, said: str) -> None:
    """In one sentence, and the model is as it was."""
    model = ours(folder)
    names = list(model.state_dict())
    with pytest.raises(QkvError, match=said) as fault:
        load_adapter(model, folder / "adapter")
    assert "\n" not in str(fault.value)
    assert list(model.state_dict()) == names


def test_a_model_without_published_names_and_a_full_folder_are_refused(llama: Path) -> None:
    model = ours(llama)
    with pytest.raises(QkvError, match="no LoRA is called 'default'"):
        save_adapter(model, llama / "out")
    load_adapter(model, llama / "adapter")
    with pytest.raises(QkvError, match="is not an empty folder"):
        save_adapter(model, llama / "adapter")
    with pytest.raises(QkvError, match="has an adapter 'default' already"):
        load_adapter(model, llama / "adapter")
    model.origin = None
    with pytest.raises(QkvError, match="not loaded from a published checkpoint"):
        save_adapter(model, llama / "out")
    assert not (llama / "out").exists()
