"""BERT against the transformers package."""

from pathlib import Path

import pytest
import transformers as tf

from tests.zoo.parity import SIZES, check_export, check_values, rough

HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering"]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_and_returns_what_was_published(head: str, tmp_path: Path) -> None:
    theirs = rough(
        getattr(tf, f"Bert{head}")(tf.BertConfig(**SIZES, num_labels=2 if head == "ForQuestionAnswering" else 5))
    )
    ours = check_values(theirs, tmp_path / "in", segments=True)
    check_export(theirs, ours, tmp_path / "out")
