"""GPT-2 against the transformers package."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qkv.checkpoints.load import load_directory
from tests.zoo.parity import answer, check_export, check_search, check_values, rough, texts

SIZES = {"vocab_size": 61, "n_positions": 97, "n_embd": 36, "n_layer": 3, "n_head": 6, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

HEADS = ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]


def model(head: str = "LMHeadModel", **others: object) -> PreTrainedModel:
    return rough(getattr(tf, f"GPT2{head}")(tf.GPT2Config(**SIZES, **others)))


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"scale_attn_weights": False, "n_inner": 50, "activation_function": "relu"},
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "tie_word_embeddings": False},
    ],
)
def test_values_searches_and_exports_are_those_of_transformers(others: dict[str, object], tmp_path: Path) -> None:
    theirs = model(**others)
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("head", HEADS)
def test_other_heads_too(head: str, tmp_path: Path) -> None:
    theirs = model(head, num_labels=2 if head == "ForQuestionAnswering" else 5)
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_the_first_files_lack_the_prefix_and_hold_masks(tmp_path: Path) -> None:
    theirs = model()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    older = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    for n in range(SIZES["n_layer"]):
        older[f"h.{n}.attn.bias"] = torch.ones(97, 97).tril()[None, None]
        older[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(older, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "n_ctx": 97, "torch_dtype": "float32"}))
    ids, _ = texts()
    with torch.no_grad():
        torch.testing.assert_close(answer(load_directory(tmp_path), ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
