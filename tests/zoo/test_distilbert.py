"""DistilBERT against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.zoo.parity import VOCAB, check_export, check_values, rough

HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


def config(**keys: Any) -> tf.DistilBertConfig:
    sizes = {"dim": 36, "n_heads": 6, "n_layers": 3, "hidden_dim": 50, "max_position_embeddings": 97}
    return tf.DistilBertConfig(vocab_size=VOCAB, **{**sizes, **keys})


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_and_returns_what_was_published(head: str, tmp_path: Path) -> None:
    theirs = rough(getattr(tf, f"DistilBert{head}")(config(num_labels=2 if head == "ForQuestionAnswering" else 5)))
    ours = check_values(theirs, tmp_path / "in")
    check_export(theirs, ours, tmp_path / "out")


def test_an_untied_head_and_another_activation(tmp_path: Path) -> None:
    theirs = rough(tf.DistilBertForMaskedLM(config(tie_word_embeddings=False, activation="relu")))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_each_head_has_its_own_dropout() -> None:
    values = {**PRESETS["distilbert-base"](), "dropout": 0.3, "seq_classif_dropout": 0.4, "qa_dropout": 0.5}
    for task, dropout in {"SequenceClassification": 0.4, "TokenClassification": 0.3, "QuestionAnswering": 0.5}.items():
        assert spec_from({**values, "architectures": [f"DistilBertFor{task}"]}).head.dropout == dropout


def test_the_preset_has_the_parameters_of_the_published_model() -> None:
    with torch.device("meta"):
        theirs = tf.DistilBertForMaskedLM(tf.DistilBertConfig.from_dict(PRESETS["distilbert-base"]()))
    assert empty(spec_of("distilbert-base")).count() == theirs.num_parameters()


def test_keys_of_older_files_are_known_and_others_refused() -> None:
    values = PRESETS["distilbert-base"]()
    assert spec_from({**values, "tie_weights_": True, "output_past": True}) == spec_of("distilbert-base")
    with pytest.raises(QkvError, match="does not know: 'hidden_size'"):
        spec_from({**values, "hidden_size": 768})
