"""The GPT of 2018 against the transformers package."""

from pathlib import Path

import pytest
import transformers as tf
from transformers import PreTrainedModel

from tests.zoo.parity import check_export, check_search, check_values, rough

SIZES = {"vocab_size": 61, "n_positions": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "pad_token_id": 0}


def model(head: str = "LMHeadModel", **others: object) -> PreTrainedModel:
    return rough(getattr(tf, f"OpenAIGPT{head}")(tf.OpenAIGPTConfig(**SIZES, **others)))


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_values_searches_and_exports_are_those_of_transformers(act: str, tmp_path: Path) -> None:
    theirs = model(afn=act)
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("head", ["Model", "ForSequenceClassification"])
def test_other_heads_too(head: str, tmp_path: Path) -> None:
    theirs = model(head, num_labels=5)
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")
