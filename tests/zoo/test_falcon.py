"""Falcon against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from qkv.errors import QkvError
from qkv.zoo import spec_from
from tests.zoo.parity import SIZES, check_export, check_search, check_values, rough

SIZED: dict[str, Any] = {
    **{key: value for key, value in SIZES.items() if key != "intermediate_size"}, "ffn_hidden_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FORMS: dict[str, dict[str, Any]] = {
    "one key-value head, one norm": {},
    "as many key-value heads as heads": {"multi_query": False, "bias": True},
    "one after the other": {"parallel_attn": False, "tie_word_embeddings": False},
    "few key-value heads, two norms": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "few key-value heads, one norm": {
        "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "activation": "relu",
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_values_searches_and_exports_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    theirs = rough(tf.FalconForCausalLM(tf.FalconConfig(**SIZED, **FORMS[form])))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


HEADS = ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_too(head: str, tmp_path: Path) -> None:
    config = tf.FalconConfig(**SIZED, num_labels=2 if head == "ForQuestionAnswering" else 5)
    theirs = rough(getattr(tf, f"Falcon{head}")(config))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_alibi_is_refused_for_its_steps() -> None:
    bias = build_alibi_tensor(torch.ones(1, 1024, dtype=torch.long), 32, torch.float32)[:, 0]
    assert bias[0, 512:].diff().unique().tolist() == [0, 2, 4]  # where ALiBi rises by its slope, 0.84
    values = tf.FalconConfig(**SIZED, alibi=True).to_dict()
    with pytest.raises(QkvError, match="alibi is True, for which qkv has no part"):
        spec_from({key: value for key, value in values.items() if key != "chunk_size_feed_forward"})
