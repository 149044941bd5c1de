"""Gemma 1 to 3 against the transformers package."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from transformers import PreTrainedModel

from qkv.zoo import PRESETS, spec_from
from tests.zoo.parity import SIZES, check_export, check_search, check_values, rough

SIZED: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 2, "head_dim": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip
SECOND = {
    "sliding_window": 5,
    "query_pre_attn_scalar": 7,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 8.0,
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 777.0},
}


def model(name: str) -> PreTrainedModel:
    match name:
        case "gemma":
            return tf.GemmaForCausalLM(tf.GemmaConfig(**SIZED, hidden_act="gelu"))
        case "gemma, untied, with biases":
            config = tf.GemmaConfig(**SIZED, hidden_act="relu", tie_word_embeddings=False, attention_bias=True)
            return tf.GemmaForCausalLM(config)
        case "gemma 2":
            return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZED, **SECOND))
        case "gemma 2 without caps":
            caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
            return tf.Gemma2ForCausalLM(tf.Gemma2Config(**SIZED, **{**SECOND, **caps}))
        case "gemma 3":
            third = {"sliding_window": 5, "query_pre_attn_scalar": 7, "sliding_window_pattern": 2}
            return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**SIZED, **third, final_logit_softcapping=8.0))
        case _:
            kinds = ["full_attention", "sliding_attention", "sliding_attention"]
            config = tf.Gemma3TextConfig(**SIZED, sliding_window=5, layer_types=kinds, rope_parameters=LINEAR)
            return tf.Gemma3ForCausalLM(config)


NAMES = ["gemma", "gemma, untied, with biases", "gemma 2", "gemma 2 without caps", "gemma 3", "gemma 3, scaled"]


@pytest.mark.parametrize("name", NAMES)
def test_values_searches_and_exports_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = rough(model(name))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


HEADS = ["GemmaModel", "GemmaForTokenClassification", "Gemma2ForSequenceClassification", "Gemma3TextModel",
         "Gemma3TextForSequenceClassification"]  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_other_heads_too(name: str, tmp_path: Path) -> None:
    kind = getattr(tf, name)
    theirs = rough(kind(kind.config_class(**SIZED, num_labels=5)))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


@pytest.mark.parametrize("window", [6, 7])
def test_embeddinggemma_reads_both_ways(window: int, tmp_path: Path) -> None:
    config = tf.Gemma3TextConfig(
        **SIZED, use_bidirectional_attention=True, sliding_window=window, sliding_window_pattern=2
    )
    check_values(rough(tf.Gemma3TextModel(config)), tmp_path)


def test_gemma_3_keeps_what_reads_images(tmp_path: Path) -> None:
    seen = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    config = tf.Gemma3Config(text_config={**SIZED, "sliding_window": 5}, vision_config=seen, mm_tokens_per_image=4)
    theirs = rough(tf.Gemma3ForConditionalGeneration(config))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_export(theirs, ours, tmp_path / "out")


def test_what_the_first_files_leave_out_is_known(tmp_path: Path) -> None:
    """The whole text part of the 4 B model's first configuration."""
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    tf.Gemma3TextConfig(**text, architectures=["Gemma3ForCausalLM"]).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    assert spec_from({"model_type": "gemma3", "text_config": text, "vision_config": {}}) == spec_from(whole)


OLD = {
    "cache_implementation": "hybrid", "rope_theta": 5e5, "rope_local_base_freq": 777.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "sliding_window_pattern": 2, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_older_files_say_the_same_by_other_keys(tmp_path: Path) -> None:
    config = tf.Gemma3TextConfig(**SIZED, sliding_window_pattern=2, rope_parameters=LINEAR)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    older = {key: value for key, value in values.items() if key not in ("rope_parameters", "layer_types")}
    del older["_sliding_window_pattern"]
    assert spec_from({**older, **OLD}) == spec_from(values)
    assert spec_from({**older, **OLD, "num_hidden_layers": 1}).stack.depth == 1  # what no layer needs is read too


def test_gemma_2_caps_unless_a_file_says_otherwise() -> None:
    def caps(**values: float | None) -> tuple[float | None, float | None]:
        said: dict[str, Any] = PRESETS["gemma-2-2b"]()
        keys = ("attn_logit_softcapping", "final_logit_softcapping")
        spec = spec_from({key: value for key, value in said.items() if key not in keys} | values)
        return spec.stack.blocks[0].branches["attn"].f.score.softcap, spec.head.softcap

    assert caps() == (50.0, 30.0)
    assert caps(attn_logit_softcapping=None, final_logit_softcapping=7.0) == (None, 7.0)
