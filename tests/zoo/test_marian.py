"""Marian against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from qkv.errors import QkvError
from qkv.spec import edit
from qkv.zoo import spec_from
from qkv.zoo.solve import configuration
from tests.zoo.pairs import check_edited, check_pairs
from tests.zoo.parity import VOCAB, check_export, check_search, rough, texts

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 36, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 50, "decoder_ffn_dim": 46, "max_position_embeddings": 64,
    "activation_function": "swish", "scale_embedding": True, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip

OLDER = {
    "add_bias_logits": False, "add_final_layer_norm": False, "classif_dropout": 0.0, "classifier_dropout": 0.0,
    "extra_pos_embeddings": VOCAB, "normalize_before": False, "normalize_embedding": False, "num_beams": 6,
    "num_hidden_layers": 3, "static_position_embeddings": True, "bad_words_ids": [[0]], "max_length": 512,
}  # fmt: skip
"""What the configurations of the OPUS-MT models say besides."""


def model(head: str = "MTModel", **changes: Any) -> PreTrainedModel:
    theirs = rough(getattr(tf, f"Marian{head}")(tf.MarianConfig(**SIZES, **changes)))
    for name, module in theirs.named_modules():
        if name.endswith("embed_positions"):
            module.weight.data.copy_(module.create_weight())
    if head == "MTModel":
        theirs.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return theirs


APART = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCAB}


@pytest.mark.parametrize(
    "changes", [{}, APART, APART | {"tie_word_embeddings": False}], ids=["shared", "apart", "untied"]
)
def test_values_searches_and_exports_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = model(**changes)
    ours = check_pairs(theirs, tmp_path / "in")
    check_search(theirs, ours, begin=1)
    check_export(theirs, ours, tmp_path / "out")


def test_the_bare_model_too(tmp_path: Path) -> None:
    theirs = model("Model")
    check_export(theirs, check_pairs(theirs, tmp_path / "in"), tmp_path / "out")


def test_vocabularies_of_two_sizes(tmp_path: Path) -> None:
    theirs = model(share_encoder_decoder_embeddings=False, decoder_vocab_size=VOCAB + 8)
    check_export(theirs, check_pairs(theirs, tmp_path / "in"), tmp_path / "out")


def test_an_edited_model_goes_back(tmp_path: Path) -> None:
    theirs, sizes = model(), {"width": 40, "**.heads": 4, "**.hidden": 44, "decoder.depth": 1, "source.vocab": 67}
    check_edited(theirs, check_pairs(theirs, tmp_path / "in"), tmp_path / "out", *two_texts(), **sizes)


def two_texts() -> list[torch.Tensor]:
    return [texts(longest=11)[0], texts(longest=9, seed=2)[0]]


def test_older_configurations_are_read_and_written() -> None:
    values = {"model_type": "marian", "architectures": ["MarianMTModel"], **SIZES, **OLDER}
    spec = spec_from(values)
    assert spec == spec_from({"model_type": "marian", **SIZES})
    made = configuration(edit(spec, "encoder.depth", 5), values)
    assert made["num_hidden_layers"] == made["encoder_layers"] == 5  # the package believes the first


@pytest.mark.parametrize("changes", [
    {"normalize_before": True}, {"normalize_embedding": True}, {"tie_word_embeddings": False},
    {"decoder_vocab_size": 5}, {"architectures": ["MarianForCausalLM"]},
])  # fmt: skip
def test_what_it_has_no_part_for_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(QkvError, match=next(iter(changes))):
        spec_from({"model_type": "marian", **SIZES, **changes})
