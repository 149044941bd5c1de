"""Phi-3 against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from tests.zoo.parity import SIZES, answer, check_export, check_search, check_values, loaded, relative, rough, texts

SIZED: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.2, 1.5], "long_factor": [2.0, 3.0, 7.0]}


def model(name: str) -> PreTrainedModel:
    match name:
        case "phi 3":
            return tf.Phi3ForCausalLM(tf.Phi3Config(**SIZED))
        case "with a window":
            return tf.Phi3ForCausalLM(tf.Phi3Config(**SIZED, sliding_window=5, tie_word_embeddings=True))
        case "a part turned":
            rope = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.7}
            return tf.Phi3ForCausalLM(tf.Phi3Config(**SIZED, rope_parameters=rope))
        case _:
            config = tf.Phi3Config(**SIZED, rope_parameters=LONG, original_max_position_embeddings=48)
            return tf.Phi3ForCausalLM(config)


@pytest.mark.parametrize("name", ["phi 3", "with a window", "a part turned", "long"])
def test_values_searches_and_exports_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = rough(model(name))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


@torch.no_grad()
def test_a_text_longer_than_those_of_training_turns_more_slowly(tmp_path: Path) -> None:
    config = tf.Phi3Config(**SIZED, rope_parameters=LONG, original_max_position_embeddings=9)
    theirs, (ids, _) = rough(tf.Phi3ForCausalLM(config)), texts()
    assert relative(answer(loaded(theirs, tmp_path), ids), theirs(ids).logits) < 1e-5


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_other_heads_too(head: str, tmp_path: Path) -> None:
    theirs = rough(getattr(tf, f"Phi3{head}")(tf.Phi3Config(**SIZED, num_labels=5)))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")
