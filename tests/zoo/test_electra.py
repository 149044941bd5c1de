"""ELECTRA against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.zoo.parity import SIZES, check_export, check_values, rough

HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering"]  # fmt: skip


def with_a_label_axis(module: nn.Module, given: Any, output: Any) -> Any:
    """The score of each token as a class's: B T → B T 1."""
    output.logits = output.logits[..., None]
    return output


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("inner", [10, 36])
def test_every_head_computes_and_returns_what_was_published(inner: int, head: str, tmp_path: Path) -> None:
    config = tf.ElectraConfig(**SIZES, embedding_size=inner, num_labels=2 if head == "ForQuestionAnswering" else 5)
    theirs = rough(getattr(tf, f"Electra{head}")(config))
    if head == "ForPreTraining":
        theirs.register_forward_hook(with_a_label_axis)
    ours = check_values(theirs, tmp_path / "in", segments=True)
    check_export(theirs, ours, tmp_path / "out")


def test_an_untied_generator(tmp_path: Path) -> None:
    theirs = rough(tf.ElectraForMaskedLM(tf.ElectraConfig(**SIZES, embedding_size=10, tie_word_embeddings=False)))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_the_discriminator_has_an_activation_of_its_own(tmp_path: Path) -> None:
    theirs = rough(tf.ElectraForPreTraining(tf.ElectraConfig(**SIZES, embedding_size=10, hidden_act="relu")))
    theirs.register_forward_hook(with_a_label_axis)
    check_values(theirs, tmp_path / "in")


def test_the_preset_has_the_parameters_of_the_published_model() -> None:
    with torch.device("meta"):
        theirs = tf.ElectraForPreTraining(tf.ElectraConfig.from_dict(PRESETS["electra-small"]()))
    assert empty(spec_of("electra-small")).count() == theirs.num_parameters()


def test_keys_of_older_files_are_known_and_others_refused() -> None:
    values = PRESETS["electra-small"]()
    older = {"position_embedding_type": "absolute", "summary_type": "first", "summary_use_proj": True}
    assert spec_from({**values, **older}) == spec_of("electra-small")
    with pytest.raises(QkvError, match="is_decoder is True"):
        spec_from({**values, "is_decoder": True})
