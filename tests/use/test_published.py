"""A published checkpoint as transformers uses it: how it searches, what an answer begins with, and what it says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from qkv.decode import (
    AtLeast,
    Ban,
    Beam,
    ForceFirst,
    ForceLast,
    Greedy,
    NoRepeat,
    RepetitionPenalty,
    Sample,
    Suppress,
    SuppressFirst,
)
from qkv.errors import QkvError
from qkv.use import Manner, Task, extract, open_published, tag
from qkv.use.published import search
from tests.use import small
from tests.use.small import SENTENCES

QUESTION = "What is looked up?"


def generated(theirs: PreTrainedModel, folder: Path, text: str, **settings: Any) -> list[int]:
    """What transformers adds to a text, or answers to it, up to its end."""
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    own = theirs.generation_config.to_dict()
    config = GenerationConfig(**{**own, "do_sample": False, "max_new_tokens": 12, **settings})
    theirs.generation_config = config
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0].tolist()
    found = found[1 if theirs.config.is_encoder_decoder else ids.shape[1] :]
    return found[: found.index(config.eos_token_id)] if config.eos_token_id in found else found


# --- what a checkpoint says of its use ---


@pytest.mark.parametrize(("says", "wanted"), [
    ({}, Greedy()),
    ({"do_sample": False, "temperature": 0.3}, Greedy()),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 0}, Sample(temperature=0.6, top_p=0.9)),
    ({"do_sample": True, "top_k": 20, "min_p": 0.05}, Sample(top_k=20, min_p=0.05)),
    ({"num_beams": 1}, Greedy()),
    ({"num_beams": 4}, Beam(4)),
    ({"num_beams": 6, "length_penalty": 2}, Beam(6, length_penalty=2.0)),
    ({"num_beams": 4, "early_stopping": True}, Beam(4, early_stopping=True)),
    ({"num_beams": 4, "early_stopping": "never"}, Beam(4)),
    ({"repetition_penalty": 1, "no_repeat_ngram_size": 0, "bad_words_ids": [], "min_length": 0}, Greedy()),
    ({"repetition_penalty": 2, "min_length": 3}, Greedy(rules=(RepetitionPenalty(2.0), AtLeast(3, prompt=True)))),
    ({"min_new_tokens": 4, "min_length": 3, "do_sample": True}, Sample(rules=(AtLeast(4),))),
    ({"num_beams": 2, "bad_words_ids": [[7], [8, 9]]}, Beam(2, rules=(Ban([[7], [8, 9]]),))),
    ({"forced_bos_token_id": 7, "forced_eos_token_id": [0, 2]}, Greedy(rules=(ForceLast(0),))),
    ({"no_repeat_ngram_size": 3, "suppress_tokens": [1, 5]}, Greedy(rules=(NoRepeat(3), Suppress([1, 5])))),
    ({"begin_suppress_tokens": [4]}, Greedy(rules=(SuppressFirst([4]),))),
])  # fmt: skip
def test_the_search_that_it_asks_for(says, wanted):
    assert search(says) == wanted


def test_a_first_token_is_forced_where_an_answer_has_one():
    says = {"forced_bos_token_id": 0, "begin_suppress_tokens": [4]}
    assert search(says, pairs=True) == Greedy(rules=(ForceFirst(0), SuppressFirst([4], after=1)))
    assert search({"begin_suppress_tokens": [4]}, pairs=True) == Greedy(rules=(SuppressFirst([4]),))


def test_generation_config_counts_more_than_config(tmp_path):
    small.bart(tmp_path)
    generation = tmp_path / "generation_config.json"
    generation.write_text(json.dumps({**json.loads(generation.read_text()), "forced_bos_token_id": 0}))
    assert open_published(tmp_path).manner == Manner(Greedy(rules=(ForceFirst(0),)), begin=(2,))
    generation.unlink()  # as before there was one: all of it in config.json
    config = json.loads((tmp_path / "config.json").read_text())
    told = {"decoder_start_token_id": 5, "forced_bos_token_id": None, "num_beams": 3}
    (tmp_path / "config.json").write_text(json.dumps({**config, **told}))
    assert open_published(tmp_path).manner == Manner(Beam(3), begin=(5,))
    generation.write_text('{"decoder_start_token_id": 7, "num_beams": 1}')
    assert open_published(tmp_path).manner == Manner(Greedy(), begin=(7,))
    generation.write_text('{"decoder_start_token_id": null, "bos_token_id": 9}')
    assert open_published(tmp_path).begin == [9]
    generation.write_text('{"decoder_start_token_id": 320}')
    with pytest.raises(QkvError, match=r"an answer begins with the tokens \(320,\); the model has 320"):
        open_published(tmp_path)
    generation.write_text('{"do_sample": true, "num_beams": 1, "temperature": "hot"}')
    with pytest.raises(QkvError, match="generation_config.json.temperature: expected a number, found 'hot'"):
        open_published(tmp_path)
    generation.write_text('{"min_length": "long"}')
    with pytest.raises(QkvError, match="generation_config.json.min_length.tokens: expected a whole number, found 'lo"):
        open_published(tmp_path)
    generation.write_text('{"do_sample": true,')
    with pytest.raises(QkvError, match="generation_config.json is no JSON"):
        open_published(tmp_path)


def test_what_is_not_followed_is_told(tmp_path):
    small.llama(tmp_path)
    says = {"repetition_penalty": 1.1, "encoder_no_repeat_ngram_size": 0, "typical_p": 0.9, "early_stopping": "never"}
    (tmp_path / "generation_config.json").write_text(json.dumps(says))
    assert open_published(tmp_path).manner.unheeded == ("early_stopping = 'never'", "typical_p = 0.9")


def test_the_longest_text_is_the_shorter_of_two_bounds(tmp_path):
    small.bert(tmp_path)
    for longest, room in ((10, 10), (500, 96), (0, 96), ("ten", 96)):
        (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
        assert open_published(tmp_path).room == room
    assert open_published(small_folder(small.llama, tmp_path)).room is None


def small_folder(make: Any, path: Path) -> Path:
    folder = path / make.__name__
    make(folder)
    return folder


# --- what it says ---


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_predict_is_generate(kind, beams, tmp_path):
    theirs = getattr(small, kind)(tmp_path)
    task = open_published(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    found = task.predict(SENTENCES, Beam(beams) if beams > 1 else None, tokens=12)
    for text, answers in zip(SENTENCES, found, strict=True):
        wanted = generated(theirs, tmp_path, text, num_beams=beams, early_stopping=False)
        assert answers[0].ids == wanted
        assert answers[0].text == own.decode(wanted, skip_special_tokens=True)


HEEDED: dict[str, Any] = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[n] for n in range(20, 90)] + [[99, 3]],
    "min_length": 9, "forced_bos_token_id": 17, "forced_eos_token_id": 2, "suppress_tokens": [120, 121, 122],
    "begin_suppress_tokens": list(range(100, 200)), "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_its_rules_are_heeded_as_by_generate(kind, beams, tmp_path):
    theirs = getattr(small, kind)(tmp_path)
    pairs = theirs.config.is_encoder_decoder
    says = {**HEEDED, "num_beams": beams, "early_stopping": True, "decoder_start_token_id": 2 if pairs else None}
    plain = open_published(tmp_path).predict(SENTENCES, tokens=12)
    (tmp_path / "generation_config.json").write_text(json.dumps(says))
    task, own = open_published(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    task.target.ends = frozenset({2})
    assert not task.manner.unheeded
    says["forced_bos_token_id"] = 17 if pairs else None  # a prompt has more tokens than one
    given = [None, Beam(3, early_stopping=True) if beams > 1 else Greedy()]  # rules stand whatever search is taken
    for found in (task.predict(SENTENCES, how, tokens=12) for how in given):
        assert [answers[0].ids for answers in found] != [answers[0].ids for answers in plain]
        for text, answers in zip(SENTENCES, found, strict=True):
            wanted = generated(theirs, tmp_path, text, **says)
            assert answers[0].ids == wanted
            assert answers[0].text == own.decode(wanted, skip_special_tokens=True)
            if task.continues and beams == 1:
                assert "".join(task.stream(task.encode(text), tokens=12)) == answers[0].text


def test_a_rule_that_is_asked_for_takes_the_place_of_the_checkpoints_own(tmp_path):
    small.llama(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.3, "min_new_tokens": 4}))
    task = open_published(tmp_path)
    assert task.heeding(Beam(2)).rules == task.manner.search.rules == (RepetitionPenalty(1.3), AtLeast(4))
    own = Greedy(rules=(NoRepeat(2), RepetitionPenalty(1.0)))
    assert task.heeding(own).rules == (NoRepeat(2), RepetitionPenalty(1.0), AtLeast(4))
    plain, ids = Greedy(rules=(RepetitionPenalty(1.0), AtLeast(0))), task.encode(SENTENCES[0])
    with_none = Task(task.model, task.tokenizers)
    assert list(task.stream(ids, plain, tokens=12)) == list(with_none.stream(ids, tokens=12))
    assert list(task.stream(ids, tokens=12)) != list(with_none.stream(ids, tokens=12))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_a_stream_is_generate_too(kind, tmp_path):
    theirs = getattr(small, kind)(tmp_path)
    task, own = open_published(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in SENTENCES:
        wanted = own.decode(generated(theirs, tmp_path, text), skip_special_tokens=True)
        pieces = list(task.stream(task.encode(text), tokens=12))
        assert "".join(pieces) == wanted and len(pieces) > 2


def test_stop_strings_end_a_stream_wherever_tokens_are_cut(tmp_path):
    small.llama(tmp_path)
    task = open_published(tmp_path)
    ids = task.encode(SENTENCES[0])
    whole = "".join(task.stream(ids, tokens=40))
    for start in range(0, len(whole) - 5, 2):
        stop = [whole[start : start + 5], "never"]
        assert "".join(task.stream(ids, tokens=40, stop=stop)) == whole[: whole.index(stop[0])]
    with pytest.raises(QkvError, match="an empty stop string would end every text"):
        list(task.stream([3], stop=["x", ""]))


def test_every_position_is_used_and_none_beyond(tmp_path):
    small.gpt2(tmp_path)
    task = open_published(tmp_path)
    task.target.ends = frozenset()
    ids = task.encode("the value of a name " * 3)
    assert len(task.predict(["the value of a name " * 3])[0][0].ids) == 64 - len(ids) + 1
    full = (ids * 9)[:64]
    assert len(list(task.stream(full))) == 2  # one token, and what closes the text
    with pytest.raises(QkvError, match="0 new tokens are asked for; at least 1 is made"):
        list(task.stream(ids, tokens=0))
    with pytest.raises(QkvError, match="-3 new tokens"):
        task.predict(["x"], tokens=-3)


# --- masks, classes, tags, answers ---


@torch.no_grad()
def test_masks_are_filled_as_by_the_pipeline(tmp_path):
    theirs, own = small.bert(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    task, text = open_published(tmp_path), "The [MASK] of a name is [MASK] up."
    ids = own(text, return_tensors="pt")["input_ids"]
    places = (ids[0] == own.mask_token_id).nonzero()[:, 0]
    p = theirs(ids).logits[0, places].softmax(-1)
    for found, row in zip(task.candidates(text, 7), p, strict=True):
        best = row.topk(7)
        assert [one.ids[0] for one in found] == best.indices.tolist()
        assert np.allclose(np.exp([one.score for one in found]), best.values, rtol=1e-4)
        assert [one.text for one in found] == own.convert_ids_to_tokens(best.indices.tolist())
    ids[0, places] = p.argmax(-1)
    [[filled]] = task.predict([text])
    assert filled.text == own.decode(ids[0], skip_special_tokens=True)
    assert np.isclose(filled.score, float(p.amax(-1).log().sum()), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "bart"])
def test_classes_are_those_of_the_pipeline(kind, tmp_path):
    theirs = getattr(small, kind)(tmp_path, "ForSequenceClassification")
    names = {0: "cold", 1: "warm", 2: "hot"} if kind == "bart" else {0: "no", 1: "yes"}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": names}))
    own, found = AutoTokenizer.from_pretrained(tmp_path), open_published(tmp_path).predict(SENTENCES, batch=3)
    for text, answers in zip(SENTENCES, found, strict=True):
        p = theirs(torch.tensor([own(text)["input_ids"]])).logits[0].softmax(-1)
        order = p.argsort(descending=True).tolist()
        assert [answer.text for answer in answers] == [names[n] for n in order]
        assert np.allclose(np.exp([answer.score for answer in answers]), p[order], atol=1e-5)


@torch.no_grad()
def test_one_class_alone_is_a_number(tmp_path):
    theirs = small.bert(tmp_path, "ForSequenceClassification", num_labels=1)
    own = AutoTokenizer.from_pretrained(tmp_path)
    for text, [answer] in zip(SENTENCES, open_published(tmp_path).predict(SENTENCES), strict=True):
        assert np.isclose(answer.score, theirs(torch.tensor([own(text)["input_ids"]])).logits.item(), rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_tags_are_those_of_the_pipeline(kind, tmp_path):
    theirs = getattr(small, kind)(tmp_path, "ForTokenClassification")
    own, task = AutoTokenizer.from_pretrained(tmp_path), open_published(tmp_path)
    for text in [*SENTENCES, "näive [SEP] 東京!", "x" * 30]:
        read = own(text, return_offsets_mapping=True, return_special_tokens_mask=True, split_special_tokens=True)
        p = theirs(torch.tensor([read["input_ids"]])).logits[0].softmax(-1)
        inside = [n for n, special in enumerate(read["special_tokens_mask"]) if not special]
        tags = tag(task, text)
        assert [(one.start, one.end) for one in tags] == [read["offset_mapping"][n] for n in inside]
        assert all(one.text == text[one.start : one.end] for one in tags)
        assert [one.label for one in tags] == [f"LABEL_{p[n].argmax()}" for n in inside]
        assert np.allclose(np.exp([one.score for one in tags]), p[inside].amax(-1), atol=1e-5)


def best_span(theirs: PreTrainedModel, read: Any, texts: list[int | None]) -> tuple[int, int, float]:
    """The pipeline's rule: of all spans in the context the one with the largest p(start) p(end), start ≤ end."""
    found = theirs(**{key: torch.tensor([read[key]]) for key in read if key in ("input_ids", "token_type_ids")})
    inside = [n for n, which in enumerate(texts) if which == 1]
    start, end = (z[0, inside].softmax(-1) for z in (found.start_logits, found.end_logits))
    pairs = (start[:, None] * end[None]).triu()
    a, b = divmod(int(pairs.argmax()), len(inside))
    return read["offset_mapping"][inside[a]][0], read["offset_mapping"][inside[b]][1], float(pairs.max())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bert", "roberta", "t5", "bart"])
def test_answers_are_those_of_the_pipeline(kind, tmp_path):
    theirs = getattr(small, kind)(tmp_path, "ForQuestionAnswering")
    own, task, answers = AutoTokenizer.from_pretrained(tmp_path), open_published(tmp_path), set()
    for context in [*SENTENCES, "Names, names and  more [SEP] names: naïve ones.", "one"]:
        read = own(
            QUESTION, context, return_offsets_mapping=True, split_special_tokens=True,
            return_token_type_ids=kind == "bert",
        )  # fmt: skip
        begin, end, p = best_span(theirs, read, read.sequence_ids(0))
        found = extract(task, QUESTION, context)
        assert found.text == context[begin:end] and np.isclose(np.exp(found.score), p, rtol=1e-3)
        answers.add(found.text)
    assert len(answers) > 3
    with pytest.raises(QkvError, match="the context is empty"):
        extract(task, QUESTION, "")


def test_a_head_that_is_missing_is_named(tmp_path):
    small.bert(tmp_path, "Model")
    task = open_published(tmp_path)
    for ask, words in (
        (lambda: task.predict(["x"]), "this model has no head that answers a text: `qkv embed`"),
        (lambda: tag(task, "x"), "only a model whose head classifies tokens"),
        (lambda: extract(task, "x", "y"), "only a model whose head finds where an answer begins"),
        (lambda: task.candidates("[MASK]"), "only an encoder with a vocabulary head fills masks"),
        (lambda: list(task.stream([3])), "only a decoder continues a text"),
    ):
        with pytest.raises(QkvError, match=words):
            ask()


# --- a tokenizer and a model that do not go together ---


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    small.llama(tmp_path)
    small.tokenizer(small.byte_pairs("<s> $A", *small.TURNS, "<|more|>"), **small.BYTES).save_pretrained(tmp_path)
    small.tokenizer(small.word_pieces()).save_pretrained(tmp_path)
    task = open_published(tmp_path)
    assert task.source.size > len(task.model.wiring.embed.table)
    piece = task.source.pieces([399])[0].removeprefix("##")
    with pytest.raises(QkvError, match="has the id 3.., and the model has 320 rows for tokens"):
        task.predict([piece, "looked up " + "".join(map(chr, range(97, 123)))])


def test_a_tokenizer_without_x_still_has_a_frame(tmp_path):
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}, []))
    small.llama(tmp_path)
    own = small.framed(made, "<s> $A", {"<s>": 0})
    small.tokenizer(own, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    assert open_published(tmp_path).encode("GATTACA") == [0, 4, 2, 5, 5, 2, 3, 2]
