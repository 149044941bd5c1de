"""ModernBERT against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.masks import Full, Window
from qkv.spec import edit
from qkv.zoo import PRESETS, spec_from, spec_of
from qkv.zoo.solve import configuration
from tests.zoo.parity import SIZES, check_export, check_values, rough

HEADS = ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True, "decoder_bias": False}


def config(**keys: Any) -> tf.ModernBertConfig:
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)
    special |= dict.fromkeys(("eos_token_id", "sep_token_id"), 1)
    return tf.ModernBertConfig(**{**SIZES, **special, "num_hidden_layers": 4, "local_attention": 7, **keys})


def check(head: str, folder: Path, **keys: Any) -> None:
    labels = 2 if head == "ForQuestionAnswering" else 5
    theirs = rough(getattr(tf, f"ModernBert{head}")(config(num_labels=labels, **keys)))
    ours = check_values(theirs, folder / "in")
    check_export(theirs, ours, folder / "out")


@pytest.mark.parametrize("head", HEADS)
def test_every_head_computes_and_returns_what_was_published(head: str, tmp_path: Path) -> None:
    check(head, tmp_path)


@pytest.mark.parametrize("head", HEADS)
def test_with_biases_where_there_were_none(head: str, tmp_path: Path) -> None:
    check(head, tmp_path, **BIASES)


def test_classes_of_the_mean(tmp_path: Path) -> None:
    check("ForSequenceClassification", tmp_path, classifier_pooling="mean", classifier_activation="relu")


def test_an_untied_head_and_another_gate(tmp_path: Path) -> None:
    check("ForMaskedLM", tmp_path, tie_word_embeddings=False, hidden_activation="silu")


def test_layers_with_rotations_of_their_own(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 30.0}
    rope = {"full_attention": linear, "sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}
    check("Model", tmp_path, layer_types=kinds, rope_parameters=rope)


def test_older_files_describe_the_same_model() -> None:
    values = PRESETS["modernbert-base"]()
    newer = tf.ModernBertConfig.from_dict(values).to_diff_dict()
    spec = spec_of("modernbert-base")
    assert "layer_types" in newer and "rope_parameters" in newer and spec_from(newer) == spec
    older = {"position_embedding_type": "absolute", "layer_norm_eps": 1e-5, "reference_compile": True,
             "repad_logits_with_grad": False}  # fmt: skip
    assert spec_from({**values, **older}) == spec
    layers = [layer.branches["attn"] for layer in spec.stack.layers]
    assert [branch.f.position.theta for branch in layers[:4]] == [160000.0, 10000.0, 10000.0, 160000.0]
    assert [branch.f.mask for branch in layers[:4]] == [Full(), Window(65), Window(65), Full()]
    assert [branch.pre is None for branch in layers] == [True] + [False] * 21


def test_a_window_without_a_theta_turns_like_the_rest() -> None:
    spec = spec_from({**PRESETS["modernbert-base"](), "local_rope_theta": None, "global_rope_theta": 80000.0})
    assert {layer.branches["attn"].f.position.theta for layer in spec.stack.layers} == {80000.0}


def test_the_preset_has_the_parameters_of_the_published_model() -> None:
    with torch.device("meta"):
        theirs = tf.ModernBertForMaskedLM(tf.ModernBertConfig.from_dict(PRESETS["modernbert-base"]()))
    assert empty(spec_of("modernbert-base")).count() == theirs.num_parameters()


def test_what_no_part_does_is_refused() -> None:
    for key, value in {"mlp_dropout": 0.1, "classifier_pooling": "max", "layer_types": ["full_attention"]}.items():
        with pytest.raises(QkvError, match=key):
            spec_from({**PRESETS["modernbert-base"](), key: value})


def test_a_class_without_a_part_is_refused_and_none_is_made_up() -> None:
    values = PRESETS["modernbert-base"]()
    with pytest.raises(QkvError, match="no head for MultipleChoice"):
        spec_from({**values, "architectures": ["ModernBertForMultipleChoice"]})
    bare = edit(spec_of("modernbert-base"), "head", None)
    assert configuration(bare, values)["architectures"] == ["ModernBertModel"]
