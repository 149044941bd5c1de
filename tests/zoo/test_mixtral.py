"""Mixtral against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from tests.zoo.parity import SIZES, check_export, check_search, check_values, rough

SIZED: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 2, "num_local_experts": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "experts_implementation": "eager",  # the default one fails on odd widths on a CPU
}  # fmt: skip


@pytest.mark.parametrize("others", [{}, {"num_experts_per_tok": 1, "head_dim": 10, "sliding_window": 5}])
def test_values_searches_and_exports_are_those_of_transformers(others: dict[str, Any], tmp_path: Path) -> None:
    theirs = rough(tf.MixtralForCausalLM(tf.MixtralConfig(**SIZED, **others)))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


HEADS = ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


@pytest.mark.parametrize("others", [{}, {"head_dim": 14, "num_key_value_heads": 3}])
@pytest.mark.parametrize("head", HEADS)
def test_other_heads_too(head: str, others: dict[str, Any], tmp_path: Path) -> None:
    config = tf.MixtralConfig(**{**SIZED, **others}, num_labels=2 if head == "ForQuestionAnswering" else 5)
    theirs = rough(getattr(tf, f"Mixtral{head}")(config))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")
