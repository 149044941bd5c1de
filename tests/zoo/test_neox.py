"""GPT-NeoX against the transformers package."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from qkv.zoo import spec_from
from tests.zoo.parity import SIZES, check_export, check_search, check_values, rough

SIZED: dict[str, Any] = {
    **SIZES, "num_attention_heads": 3, "rotary_pct": 0.5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "relu"},
        {"attention_bias": False, "rope_parameters": LINEAR},
    ],
)
def test_values_searches_and_exports_are_those_of_transformers(others: dict[str, Any], tmp_path: Path) -> None:
    theirs = rough(tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZED, **others)))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


HEADS = ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_too(head: str, tmp_path: Path) -> None:
    config = tf.GPTNeoXConfig(**SIZED, num_labels=2 if head == "ForQuestionAnswering" else 5)
    theirs = rough(getattr(tf, f"GPTNeoX{head}")(config))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_older_files_say_the_same_by_other_keys(tmp_path: Path) -> None:
    config = tf.GPTNeoXConfig(**SIZED, rotary_emb_base=777)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    older = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert spec_from({**older, "rotary_pct": 0.5, "rotary_emb_base": 777, "rope_scaling": None}) == spec_from(values)
