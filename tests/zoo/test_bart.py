"""BART and mBART against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import PreTrainedModel

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.spec import walk
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.zoo.pairs import check_edited, check_pairs
from tests.zoo.parity import END, VOCAB, T, check_export, check_search, loaded, relative, rough, texts

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 36, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 6,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 50, "decoder_ffn_dim": 46, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": END, "bos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip

OLDER = {
    "add_bias_logits": False, "add_final_layer_norm": False, "classif_dropout": 0.1, "extra_pos_embeddings": 2,
    "normalize_before": False, "normalize_embedding": True, "num_hidden_layers": 6, "static_position_embeddings": False,
    "force_bos_token_to_be_generated": True, "_num_labels": 3, "do_blenderbot_90_layernorm": False, "output_past": True,
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "init_std": 0.02, "no_repeat_ngram_size": 3,
}  # fmt: skip
"""What the first configurations say besides."""


def model(kind: str, head: str, **changes: Any) -> PreTrainedModel:
    theirs = rough(getattr(tf, f"{kind}{head}")(getattr(tf, f"{kind}Config")(**SIZES, **changes)))
    if head == "ForConditionalGeneration":
        theirs.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    return theirs


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
@pytest.mark.parametrize("scaled", [False, True])
def test_values_searches_and_exports_are_those_of_transformers(kind: str, scaled: bool, tmp_path: Path) -> None:
    theirs = model(kind, "ForConditionalGeneration", scale_embedding=scaled)
    ours = check_pairs(theirs, tmp_path / "in")
    check_search(theirs, ours, begin=1)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
@pytest.mark.parametrize("head", ["Model", "ForQuestionAnswering"])
def test_other_heads_too(kind: str, head: str, tmp_path: Path) -> None:
    theirs = model(kind, head)
    check_export(theirs, check_pairs(theirs, tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
@torch.no_grad()
def test_a_text_is_classified_at_its_end(kind: str, tmp_path: Path) -> None:
    theirs = model(kind, "ForSequenceClassification", num_labels=5)
    ours = loaded(theirs, tmp_path / "in")
    ids, valid = texts()
    ids[torch.arange(len(ids)), valid.sum(1) - 1] = END
    ids = ids.where(valid, 0)
    target = torch.cat((torch.ones_like(ids[:, :1]), ids[:, :-1]), 1)
    whole = theirs(ids, attention_mask=valid.long(), decoder_input_ids=target).logits
    assert relative(ours(target, valid=valid, **ours.encode(ids, valid=valid)), whole) < 1e-5
    order = (torch.arange(T) + valid.sum(1, keepdim=True)) % T  # padding on the left
    ids, target, valid = (x.gather(1, order) for x in (ids, target, valid))
    assert relative(ours(target, valid=valid, **ours.encode(ids, valid=valid)), whole) < 1e-5
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_an_edited_model_goes_back(kind: str, tmp_path: Path) -> None:
    theirs = model(kind, "ForConditionalGeneration")
    ours, two = loaded(theirs, tmp_path / "in"), [texts(longest=11)[0], texts(longest=9, seed=2)[0]]
    sizes = {"width": 40, "encoder.**.heads": 8, "**.hidden": 44, "encoder.depth": 1, "source.vocab": 67}
    check_edited(theirs, ours, tmp_path / "out", *two, **sizes)


@pytest.mark.parametrize("name", ["bart-base", "bart-large"])
def test_the_presets_have_the_published_sizes(name: str) -> None:
    values = PRESETS[name]()
    with torch.device("meta"):
        theirs = tf.BartForConditionalGeneration(tf.BartConfig.from_dict(values))
    ours = spec_of(name)
    assert empty(ours).count() == theirs.num_parameters() + values["vocab_size"]  # a bias, theirs no parameter
    assert spec_from({**values, **OLDER, "num_hidden_layers": values["encoder_layers"]}) == ours


def test_dropouts_stand_where_the_package_has_them() -> None:
    said = {"dropout": 0.3, "attention_dropout": 0.2, "classifier_dropout": 0.4}
    spec = spec_from({**PRESETS["bart-base"](), **said, "architectures": ["BartForSequenceClassification"]})
    found = {path: value for path, value in walk(spec) if path.endswith("dropout")}
    wanted = {path: 0.2 if path.endswith("f.dropout") else 0.4 if path.startswith("head") else 0.3 for path in found}
    assert found == wanted and len(found) == 2 + 2 + 6 * 2 * (1 + 2) + 6 * 3 - 6


@pytest.mark.parametrize("changes", [
    {"normalize_before": True}, {"extra_pos_embeddings": 1}, {"tie_word_embeddings": False}, {"num_hidden_layers": 5},
    {"architectures": ["BartForCausalLM"]},
])  # fmt: skip
def test_what_it_has_no_part_for_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(QkvError, match="CausalLM" if "architectures" in changes else next(iter(changes))):
        spec_from({**PRESETS["bart-base"](), **changes})
