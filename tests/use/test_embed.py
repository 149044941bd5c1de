"""Vectors of texts, by the rule of the sentence-transformers package written out with transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, T5EncoderModel

from qkv.errors import QkvError
from qkv.use import embed, open_published
from tests.use import small
from tests.use.small import SENTENCES

TEXTS = ["", *SENTENCES, "name", " ".join(SENTENCES), "naïve 東京"]


def sentence(folder: Path, pool: str, unit: bool, longest: int | None = None, old: bool = True) -> None:
    """The files that the sentence-transformers package keeps beside a model."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if unit else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": n, "name": str(n), "path": paths[n], "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    flags = {f"pooling_mode_{name}": mode == pool for mode, name in names.items()}
    config = {"word_embedding_dimension": 24, **(flags if old else {"pooling_mode": pool})}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    if longest is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))


@torch.no_grad()
def by_hand(folder: Path, pool: str, unit: bool, longest: int) -> Tensor:
    theirs, own, rows = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), []
    for text in TEXTS:
        x = theirs(torch.tensor([own(text, truncation=True, max_length=longest)["input_ids"]])).last_hidden_state[0]
        rows.append({"mean": x.mean(0), "cls": x[0], "max": x.amax(0)}[pool])
    vectors = torch.stack(rows)
    return vectors / vectors.norm(dim=1, keepdim=True) if unit else vectors


@pytest.mark.parametrize("pool", ["mean", "cls", "max"])
@pytest.mark.parametrize("unit", [True, False])
def test_pooled_as_its_files_say(pool: str, unit: bool, tmp_path: Path) -> None:
    small.bert(tmp_path, "Model")
    sentence(tmp_path, pool, unit, longest=15, old=unit)
    wanted = by_hand(tmp_path, pool, unit, 15)
    task = open_published(tmp_path)
    found = [embed(task, TEXTS, batch=batch, cut=True) for batch in (1, 3, 100)]
    for vectors in found:
        assert vectors.shape == wanted.shape and vectors.dtype == torch.float32
        assert float((vectors - wanted).abs().max() / wanted.abs().max()) < 1e-5
    swapped = embed(task, TEXTS[::-1], batch=2, cut=True).flip(0)
    assert torch.allclose(swapped, wanted, atol=1e-5 * float(wanted.abs().max()))
    with pytest.raises(QkvError, match="text 2 has 16 tokens and the model takes 15: shorten or split it"):
        embed(task, TEXTS)


KINDS: dict[str, Any] = {
    "bert": {}, "roberta": {"head": "ForMaskedLM"}, "t5": {"head": "EncoderModel"}, "llama": {}, "gpt2": {"room": 96},
    "mamba": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_rule_gives_the_mean(kind: str, tmp_path: Path) -> None:
    getattr(small, kind)(tmp_path, **KINDS[kind])
    task = open_published(tmp_path)
    texts, own = TEXTS[1:], AutoTokenizer.from_pretrained(tmp_path)
    theirs = (T5EncoderModel if kind == "t5" else AutoModel).from_pretrained(tmp_path).eval()
    for text, found in zip(texts, embed(task, texts, batch=2), strict=True):
        with torch.no_grad():
            x = theirs(torch.tensor([own(text)["input_ids"]])).last_hidden_state[0].mean(0)
        assert np.allclose(found, x / x.norm(), atol=2e-5)
        assert np.isclose(float(found.norm()), 1, atol=1e-5)


def test_nothing_and_too_little(tmp_path: Path) -> None:
    small.gpt2(tmp_path / "gpt2")
    task = open_published(tmp_path / "gpt2")
    assert embed(task, []).shape == (0, 0)
    with pytest.raises(QkvError, match="text 2 is empty"):
        embed(task, ["name", ""])
    with pytest.raises(QkvError, match="text 1 is empty"):
        embed(task, ["", "name"], cut=True)
    with pytest.raises(QkvError, match="a batch holds at least 1 text, not 0"):
        embed(task, ["name"], batch=0)
    small.bart(tmp_path / "bart")
    with pytest.raises(QkvError, match="an encoder-decoder has no vector of a text"):
        embed(open_published(tmp_path / "bart"), ["name"])
