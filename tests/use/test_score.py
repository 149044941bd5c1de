"""Perplexity against its definition: one token at a time, in fp64, each with what stands before it in its window."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from qkv.errors import QkvError
from qkv.use import Score, open_published, score
from tests.use import small
from tests.use.small import LINES, SENTENCES

TEXT = "\n".join(LINES[:3])


@torch.no_grad()
def naive(theirs: PreTrainedModel, begin: list[int], ids: list[int], context: int, stride: int) -> Score:
    """Every window is begun anew; a token counts in the first window that holds it."""
    model, nats, scored, end = theirs.double(), 0.0, 0, 0
    first = 0 if begin else 1
    while end < len(ids):
        least = context - len(begin)
        new = end + min(stride, least if begin else least - 1) if end else least
        new = min(new, len(ids))
        window = [*begin, *ids[max(0, new - least) : new]]
        for n in range(max(end, first), new):
            at = len(window) - (new - n)
            nats -= float(model(torch.tensor([window[:at]])).logits[0, -1].log_softmax(-1)[ids[n]])
            scored += 1
        end = new
    return Score(nats, scored, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize(("context", "stride"), [(9, 1), (12, 5), (12, 12), (12, 11), (60, 7), (60, None), (3, 1)])
def test_each_token_counts_once(kind: str, context: int, stride: int | None, tmp_path: Path) -> None:
    theirs = getattr(small, kind)(tmp_path)
    task, own = open_published(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = own(TEXT, add_special_tokens=False)["input_ids"][:90]
    text = own.decode(ids)
    assert own(text, add_special_tokens=False)["input_ids"] == ids
    begin = [0] if kind == "llama" else []
    wanted = naive(theirs, begin, ids, context, stride or context // 2)
    found = score(task, text, context=context, stride=stride)
    assert found.tokens == wanted.tokens == len(ids) - (not begin)
    assert math.isclose(found.nats, wanted.nats, rel_tol=1e-5)
    assert found.bytes == len(text.encode())
    assert math.isclose(found.perplexity, math.exp(wanted.nats / wanted.tokens), rel_tol=1e-4)
    assert math.isclose(found.bits_per_byte, wanted.nats / math.log(2) / len(text.encode()), rel_tol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_short_text_is_read_at_once(kind: str, tmp_path: Path) -> None:
    theirs = getattr(small, kind)(tmp_path)
    task, own = open_published(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [*SENTENCES, "name", "nä"]:
        ids = torch.tensor([own(text)["input_ids"]])
        loss = theirs(ids, labels=ids).loss.item()
        for context, stride in ((None, None), (64, 1), (64, 64)):
            assert math.isclose(
                score(task, text, context=context, stride=stride).perplexity, math.exp(loss), rel_tol=1e-4
            )


def test_weights_of_16_bits_lose_no_digits_of_the_sum(tmp_path: Path) -> None:
    small.llama(tmp_path)
    task = open_published(tmp_path, torch.bfloat16)
    ids = task.encode(TEXT)
    with torch.inference_mode():
        log_p = task.model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    assert task.model.head.weight.dtype == torch.bfloat16
    assert math.isclose(score(task, TEXT).nats, -float(log_p[range(len(ids) - 1), ids[1:]].sum()), rel_tol=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (0, 1), (10, 0), (10, 11), (10, -1), (-5, 2), (2, 3)])
def test_windows_that_score_nothing(context: int, stride: int, tmp_path: Path) -> None:
    small.gpt2(tmp_path)
    no_room, no_step = "predicts nothing: it has room for 2 tokens", f"a stride lies between 1 and .*; it is {stride}"
    words = no_room if context < 2 else no_step
    with pytest.raises(QkvError, match=words):
        score(open_published(tmp_path), TEXT, context=context, stride=stride)


def test_what_has_no_perplexity_says_so(tmp_path: Path) -> None:
    small.gpt2(tmp_path / "gpt2")
    task = open_published(tmp_path / "gpt2")
    for text in ("", "e"):  # nothing stands before its first token
        with pytest.raises(QkvError, match=f"the text has {len(text)} tokens: nothing stands before"):
            score(task, text)
    with pytest.raises(QkvError, match="a context of 65 is more than the model's 64 positions"):
        score(task, TEXT, context=65)
    small.llama(tmp_path / "llama")
    task = open_published(tmp_path / "llama")
    assert score(task, "e").tokens == 1
    with pytest.raises(QkvError, match="the text has 0 tokens"):
        score(task, "")
    for name in ("bert", "t5"):
        getattr(small, name)(tmp_path / name)
        with pytest.raises(QkvError, match="only a decoder has a perplexity"):
            score(open_published(tmp_path / name), TEXT)
