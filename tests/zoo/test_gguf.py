"""The tables of GGUF against the gguf package's own."""

import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import transformers as tf
from transformers import PreTrainedModel

from qkv.checkpoints.load import load_directory
from qkv.checkpoints.names import parse
from qkv.errors import QkvError
from qkv.zoo import gguf as table
from qkv.zoo.registry import FAMILIES
from tests.zoo.parity import SIZES, rough

GROUPED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, attention_bias=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GROUPED)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=36, n_layer=3, n_head=6, n_positions=9)),
    "gptneox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES, rotary_pct=1.0)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=61, hidden_size=36, num_hidden_layers=3)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES), add_pooling_layer=False),
}


def architecture(name: str) -> gguf.MODEL_ARCH:
    return next(one for one, called in gguf.MODEL_ARCH_NAMES.items() if called == name)


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_is_called_as_the_reference_calls_it(name: str, tmp_path: Path) -> None:
    rough(MODELS[name]()).save_pretrained(tmp_path)
    model = load_directory(tmp_path)
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    made = next(one for one in table.ARCHITECTURES if one.name == name).tables(model.spec)[0]
    ours: dict[str, str] = {}
    for link in parse(made).links(shapes):
        ours.setdefault(link.targets[0], link.sources[0])
    names = gguf.get_tensor_name_map(architecture(name), SIZES["num_hidden_layers"])
    for link in model.origin.plan.links:
        said = names.get_name(link.sources[0], try_suffixes=(".weight", ".bias"))
        assert ours[link.targets[0]] == said, link.sources[0]


@pytest.mark.parametrize("one", table.ARCHITECTURES, ids=lambda one: one.kind)
def test_every_key_and_name_is_one_of_the_format(one: table.Architecture) -> None:
    known = {
        value.replace("{arch}.", "")
        for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope, gguf.Keys.SSM)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    said = {key for key, _ in one.keys.rows} | set(one.keys.fixed) | set(one.keys.inert) | set(table.ROPE_KEYS.split())
    assert said <= known
    assert one.kind in FAMILIES
    sharing = {other.name for other in table.ARCHITECTURES if other.names == one.names}
    tensors = [tensor for name in sharing for tensor in gguf.MODEL_TENSORS[architecture(name)]]
    held = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{i}") for tensor in tensors}
    for line in filter(str.strip, one.names.splitlines()):
        stem = re.sub(r"(\.\{e\})?\.(weight|bias)$", "", line.split()[0])
        lists = re.search(r"\{(\w+(,\w+)+)\}", stem)
        for part in lists[1].split(",") if lists else ():
            assert stem.replace(lists[0], part) in held, line
        assert lists or stem in held, line


def test_the_special_tokens_and_types_are_the_references() -> None:
    ids = {value for value in vars(gguf.Keys.Tokenizer).values() if isinstance(value, str)}
    ids.add("tokenizer.ggml.cls_token_id")  # llama.cpp reads it; the package has dropped it
    assert {f"tokenizer.ggml.{name}_token_id" for name in table.SPECIAL.values()} <= ids
    kinds = gguf.TokenType
    assert (kinds.NORMAL, kinds.CONTROL, kinds.USER_DEFINED, kinds.UNUSED) == (
        table.NORMAL, table.CONTROL, table.USER_DEFINED, table.UNUSED,
    )  # fmt: skip
    types = gguf.LlamaFileType
    for name, number in table.FILE_TYPES.items():
        assert number == types["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]


def test_the_family_of_a_file() -> None:
    def kind(*keys: str) -> str:
        return table.architecture_of("llama", frozenset(keys), "x.gguf").kind

    assert kind() == "llama" and kind("attention.sliding_window") == "mistral"
    assert kind("expert_count", "attention.sliding_window") == "mixtral"
    assert table.architecture_for("gemma3_text").name == "gemma3"
    with pytest.raises(QkvError, match=r"x\.gguf: qkv does not know the architecture 'lama'; did you mean 'llama'\?"):
        table.architecture_of("lama", frozenset(), "x.gguf")
    with pytest.raises(QkvError, match="GGUF has no form for a 't5' model"):
        table.architecture_for("t5")
