"""ALBERT against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.zoo.parity import SIZES, check_export, check_values, rough

HEADS = ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification",
         "ForQuestionAnswering"]  # fmt: skip


def config(**keys: Any) -> tf.AlbertConfig:
    return tf.AlbertConfig(**{**SIZES, "embedding_size": 10, "num_hidden_layers": 5, **keys})


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_and_returns_what_was_published(head: str, tmp_path: Path) -> None:
    theirs = rough(getattr(tf, f"Albert{head}")(config(num_labels=2 if head == "ForQuestionAnswering" else 5)))
    ours = check_values(theirs, tmp_path / "in", segments=True)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("groups", [2, 3, 5])
def test_layers_of_a_group_share_their_weights(groups: int, tmp_path: Path) -> None:
    theirs = rough(tf.AlbertModel(config(num_hidden_groups=groups)))
    ours = check_values(theirs, tmp_path / "in")
    assert ours.spec.stack.modules == groups
    check_export(theirs, ours, tmp_path / "out")


def test_a_table_as_wide_as_the_layers_is_projected_too(tmp_path: Path) -> None:
    check_values(rough(tf.AlbertForMaskedLM(config(embedding_size=36))), tmp_path / "in")


def test_an_untied_head_reads_the_bias_that_counts(tmp_path: Path) -> None:
    theirs = rough(tf.AlbertForMaskedLM(config(tie_word_embeddings=False)))
    assert not torch.equal(theirs.predictions.bias, theirs.predictions.decoder.bias)
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_the_preset_has_the_parameters_of_the_published_model() -> None:
    with torch.device("meta"):
        theirs = tf.AlbertForMaskedLM(tf.AlbertConfig.from_dict(PRESETS["albert-base-v2"]()))
    assert empty(spec_of("albert-base-v2")).count() == theirs.num_parameters()


def test_keys_of_older_files_are_known_and_others_refused() -> None:
    values = PRESETS["albert-base-v2"]()
    older = {"down_scale_factor": 1, "gap_size": 0, "net_structure_type": 0, "num_memory_blocks": 0}
    assert spec_from({**values, **older, "layers_to_keep": []}) == spec_of("albert-base-v2")
    with pytest.raises(QkvError, match="inner_group_num is 2"):
        spec_from({**values, "inner_group_num": 2})
