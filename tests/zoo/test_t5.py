"""T5 against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import PreTrainedModel

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.models import EncoderDecoder
from qkv.spec import edit, walk
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.zoo.pairs import check_edited, check_pairs
from tests.zoo.parity import VOCAB, check_export, check_search, check_values, rough, texts

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 36, "d_kv": 10, "d_ff": 50, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0,
}  # fmt: skip

FORMS: dict[str, dict[str, Any]] = {
    "1.0": {},
    "1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "1.1, its head kept tied": {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False},
    "mt5": {},
    "mt5, its head kept tied": {"feed_forward_proj": "relu"},
}


def model(form: str, head: str = "ForConditionalGeneration") -> PreTrainedModel:
    kind = "MT5" if "mt5" in form else "T5"
    theirs = rough(getattr(tf, f"{kind}{head}")(getattr(tf, f"{kind}Config")(**SIZES, **FORMS[form])))
    if form in ("1.1", "mt5") and hasattr(theirs, "lm_head"):
        generator = torch.Generator().manual_seed(3)
        theirs.lm_head.weight = nn.Parameter(torch.randn(theirs.lm_head.weight.shape, generator=generator))
    return theirs


@pytest.mark.parametrize("form", FORMS)
def test_values_searches_and_exports_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    theirs = model(form)
    ours = check_pairs(theirs, tmp_path / "in")
    check_search(theirs, ours, begin=0)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", ["Model", "ForQuestionAnswering"])
def test_other_heads_too(form: str, head: str, tmp_path: Path) -> None:
    theirs = model(form, head)
    check_export(theirs, check_pairs(theirs, tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_the_encoder_alone(form: str, tmp_path: Path) -> None:
    theirs = model(form, "EncoderModel")
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize("form", ["1.0", "1.1", "mt5"])
def test_an_edited_model_goes_back(form: str, tmp_path: Path) -> None:
    theirs = model(form)
    ours, two = check_pairs(theirs, tmp_path / "in"), [texts(longest=11)[0], texts(longest=9, seed=2)[0]]
    sizes = {"width": 40, "**.heads": 5, "**.hidden": 44, "encoder.depth": 1, "source.vocab": 67, "**.buckets": 12}
    if form == "1.0":
        sizes["head.scale"] = 40**-0.5
    check_edited(theirs, ours, tmp_path / "out", *two, **sizes)


@pytest.mark.parametrize("name", ["t5-small", "t5-base", "t5-v1.1-small", "mt5-small"])
def test_the_presets_have_the_published_sizes(name: str) -> None:
    values = PRESETS[name]()
    kind = "MT5" if name.startswith("mt5") else "T5"
    with torch.device("meta"):
        theirs = getattr(tf, f"{kind}ForConditionalGeneration")(getattr(tf, f"{kind}Config").from_dict(values))
    ties_until_a_file_is_read = name in ("t5-v1.1-small", "mt5-small")
    own = values["vocab_size"] * values["d_model"] * ties_until_a_file_is_read
    assert empty(spec_of(name)).count() == theirs.num_parameters() + own


def test_older_configurations() -> None:
    values = PRESETS["t5-small"]()
    older = {
        "n_positions": 512,
        "output_past": True,
        "initializer_factor": 1.0,
        "task_specific_params": {"summarization": {}},
    }
    named = {"architectures": ["T5WithLMHeadModel"]}
    left_out = ("feed_forward_proj", "num_decoder_layers", "relative_attention_max_distance", "tie_word_embeddings")
    first = {key: value for key, value in values.items() if key not in left_out}
    assert spec_from({**first, **older, **named}) == spec_of("t5-small")


def test_dropout_stands_where_the_package_has_it() -> None:
    spec = spec_from({**PRESETS["t5-small"](), "dropout_rate": 0.3})
    found = [path for path, value in walk(spec) if path.endswith("dropout") and value == 0.3]
    assert len(found) == 1 + 6 * (2 + 1) + 6 * (3 + 2)  # the embedding; each branch, and each attention's weights


def test_tied_and_scaled_are_told_apart_by_configuration_and_file() -> None:
    def read(keys: tuple[str, ...] = (), **changes: Any) -> tuple[bool, bool]:
        spec = spec_from({**PRESETS["t5-small"](), **changes}, [*keys, *map(str, range(99))] if keys else ())
        assert isinstance(spec, EncoderDecoder)
        return spec.head.tied, spec.head.scale is not None

    shared, both = ("shared.weight",), ("shared.weight", "lm_head.weight")
    assert read() == read(shared) == read(both) == (True, True)
    assert read(tie_word_embeddings=False) == read(both, tie_word_embeddings=False) == (False, False)
    assert read(both, scale_decoder_outputs=False) == (False, False)  # as the package writes 1.1 today
    assert read(shared, tie_word_embeddings=False) == (False, False)  # and then the file lacks the head
    assert read(both, tie_word_embeddings=False, scale_decoder_outputs=True) == (False, True)


@pytest.mark.parametrize("key, value", [("feed_forward_proj", "gated-tanhshrink"), ("feed_forward_proj", "split-relu"),
                                        ("dense_act_fn", "silu"), ("is_gated_act", True)])  # fmt: skip
def test_what_it_has_no_part_for_is_refused(key: str, value: object) -> None:
    with pytest.raises(QkvError, match=key):
        spec_from({**PRESETS["t5-small"](), key: value})


def test_an_activation_is_named_in_two_keys(tmp_path: Path) -> None:
    theirs = model("1.0")
    ours, two = check_pairs(theirs, tmp_path / "in"), [texts(longest=11)[0], texts(longest=9, seed=2)[0]]
    check_edited(theirs, ours, tmp_path / "out", *two, **{"**.act": "silu"})
    assert edit(ours.spec, "**.act", "silu") != ours.spec


def test_mt5_has_defaults_of_its_own() -> None:
    values = PRESETS["mt5-small"]()
    assert spec_from({key: value for key, value in values.items() if key != "feed_forward_proj"}) == spec_of(
        "mt5-small"
    )
    spec = spec_from({**values, "tie_word_embeddings": True})
    assert isinstance(spec, EncoderDecoder) and spec.head.tied and spec.head.scale is None
    with pytest.raises(QkvError, match="no mt5 model for SequenceClassification"):
        spec_from({**values, "architectures": ["MT5ForSequenceClassification"]})
