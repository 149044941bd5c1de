"""LLaMA and what grew from it against the transformers package."""

from pathlib import Path

import pytest
import transformers as tf
from transformers import PreTrainedModel

from tests.zoo.parity import SIZES, check_export, check_search, check_values, rough

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
        case "mistral":
            return tf.MistralForCausalLM(tf.MistralConfig(**SIZED, sliding_window=5))
        case "qwen2":
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZED))
        case "qwen2 with windows":
            windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
            return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZED, **windows))
        case _:
            return tf.Qwen3ForCausalLM(tf.Qwen3Config(**SIZED, head_dim=10))


NAMES = ["llama", "llama, tied, with biases", "llama 3.1", "mistral", "qwen2", "qwen2 with windows", "qwen3"]


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
