"""LLaMA and what grew from it against the transformers package."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from qkv.checkpoints.load import load_directory
from qkv.errors import QkvError
from tests.zoo.parity import SIZES, check_export, check_search, check_values, relative, rough, texts

SIZED = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}


def model(name: str) -> PreTrainedModel:
    match name:
        case "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZED))
        case "llama, tied, with biases":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZED, tie_word_embeddings=True, attention_bias=True))
        case "llama 3.1":
            rope = {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }  # fmt: skip
            return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZED, rope_parameters=rope))
        case "llama, all with biases":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZED, attention_bias=True, mlp_bias=True))
        case "mistral":
            return tf.MistralForCausalLM(tf.MistralConfig(**SIZED, sliding_window=5))
        case "qwen2":
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZED))
        case "qwen2 with windows":
            windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZED, **windows))
        case _:
            return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZED, head_dim=10))


NAMES = [
    "llama", "llama, tied, with biases", "llama, all with biases", "llama 3.1", "mistral", "qwen2",
    "qwen2 with windows", "qwen3",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_values_searches_and_exports_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = rough(model(name))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
@pytest.mark.parametrize(
    "head", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
def test_other_heads_too(kind: str, head: str, tmp_path: Path) -> None:
    config = getattr(tf, f"{kind}Config")(**SIZED, num_labels=2 if head == "ForQuestionAnswering" else 5)
    theirs = rough(getattr(tf, f"{kind}{head}")(config))
    ours = check_values(theirs, tmp_path / "in")
    check_export(theirs, ours, tmp_path / "out")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
ROPES: dict[str, dict[str, Any]] = {
    "the base beside the table": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
    "the base beside a scaling": {"rope_parameters": YARN, "rope_theta": 1e6},
    "yarn by another tool": {"rope_parameters": None, "rope_scaling": {**YARN, "finetuned": True, "mscale_all_dim": 0}},
    "a yarn that says no factor": {
        "rope_parameters": None, "rope_scaling": {**YARN, "factor": None}, "max_position_embeddings": 96,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_what_a_file_says_of_rotary_positions_is_what_transformers_reads(name: str, tmp_path: Path) -> None:
    rough(tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZED, head_dim=10))).save_pretrained(tmp_path)
    saved = {**json.loads((tmp_path / "config.json").read_text()), **ROPES[name]}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in saved.items() if value is not None}))
    theirs, (ids, _) = tf.Qwen3ForCausalLM.from_pretrained(tmp_path).float().eval(), texts()
    with torch.no_grad():
        assert relative(load_directory(tmp_path)(ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_scaling": YARN}, "has rope_parameters and rope_scaling: move what rope_scaling says"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_it_says_twice_or_to_no_effect_is_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    tf.LlamaForCausalLM(tf.LlamaConfig(**SIZED)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, **values}))
    with pytest.raises(QkvError, match=said):
        load_directory(tmp_path)
