"""RoBERTa, XLM-R and CamemBERT against the transformers package."""

from pathlib import Path

import pytest
import torch
import transformers as tf

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.spec import edit
from qkv.zoo import PRESETS, spec_from, spec_of
from qkv.zoo.solve import configuration
from tests.zoo.parity import SIZES, check_export, check_values, rough

HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_every_head_computes_and_returns_what_was_published(kind: str, head: str, tmp_path: Path) -> None:
    labels = 2 if head == "ForQuestionAnswering" else 5
    theirs = rough(getattr(tf, f"{kind}{head}")(getattr(tf, f"{kind}Config")(**SIZES, num_labels=labels)))
    ours = check_values(theirs, tmp_path / "in", segments=True)
    check_export(theirs, ours, tmp_path / "out")


def test_an_untied_head_reads_the_bias_that_counts(tmp_path: Path) -> None:
    theirs = rough(tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES, tie_word_embeddings=False)))
    assert not torch.equal(theirs.lm_head.bias, theirs.lm_head.decoder.bias)
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_positions_begin_behind_the_padding(tmp_path: Path) -> None:
    theirs = rough(tf.RobertaModel(tf.RobertaConfig(**SIZES, pad_token_id=0)))
    check_values(theirs, tmp_path / "in")


@pytest.mark.parametrize("name", ["roberta-base", "xlm-roberta-base"])
def test_presets_have_the_parameters_of_the_published_models(name: str) -> None:
    values = PRESETS[name]()
    with torch.device("meta"):
        theirs = tf.AutoModelForMaskedLM.from_config(tf.AutoConfig.for_model(**values))
    assert empty(spec_of(name)).count() == theirs.num_parameters()


def test_keys_of_older_files_are_known_and_others_refused() -> None:
    values = PRESETS["xlm-roberta-base"]()
    older = {"position_embedding_type": "absolute", "output_past": True, "gradient_checkpointing": False}
    assert spec_from({**values, **older, "classifier_dropout": None}) == spec_of("xlm-roberta-base")
    with pytest.raises(QkvError, match="position_embedding_type is 'relative_key'"):
        spec_from({**values, "position_embedding_type": "relative_key"})
    with pytest.raises(QkvError, match="does not know: 'window'"):
        spec_from({**values, "window": 3})


def test_a_class_without_a_part_is_refused_and_none_is_made_up() -> None:
    values = PRESETS["xlm-roberta-base"]()
    with pytest.raises(QkvError, match="no head for MultipleChoice"):
        spec_from({**values, "architectures": ["XLMRobertaForMultipleChoice"]})
    bare = edit(spec_of("xlm-roberta-base"), "head", None)
    assert configuration(bare, values)["architectures"] == ["XLMRobertaModel"]
