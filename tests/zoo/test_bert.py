"""BERT against the transformers package."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from qkv.checkpoints.load import load_directory
from tests.zoo.parity import SIZES, check_export, check_values, loaded, rough

HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering"]  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_and_returns_what_was_published(head: str, tmp_path: Path) -> None:
    theirs = rough(
        getattr(tf, f"Bert{head}")(tf.BertConfig(**SIZES, num_labels=2 if head == "ForQuestionAnswering" else 5))
    )
    ours = check_values(theirs, tmp_path / "in", segments=True)
    check_export(theirs, ours, tmp_path / "out")


def test_an_untied_head_reads_the_bias_that_counts(tmp_path: Path) -> None:
    theirs = rough(tf.BertForMaskedLM(tf.BertConfig(**SIZES, tie_word_embeddings=False)))
    assert not torch.equal(theirs.cls.predictions.bias, theirs.cls.predictions.decoder.bias)
    check_export(theirs, check_values(theirs, tmp_path / "in", segments=True), tmp_path / "out")


@pytest.mark.parametrize("head", ["Model", "ForPreTraining"])
def test_the_first_files_name_norms_otherwise(head: str, tmp_path: Path) -> None:
    theirs = rough(getattr(tf, f"Bert{head}")(tf.BertConfig(**SIZES)))
    ours, file = loaded(theirs, tmp_path / "in"), tmp_path / "in" / "model.safetensors"
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {re.sub("|".join(older), lambda found: older[found[0]], name): x for name, x in load_file(file).items()}
    assert sum("gamma" in name for name in renamed) == (7 if head == "Model" else 8)
    save_file(renamed, file, {"format": "pt"})
    again = load_directory(tmp_path / "in")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    check_export(theirs, again, tmp_path / "out")
