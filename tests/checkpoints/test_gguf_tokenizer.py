"""tokenizer.json as GGUF's metadata; WordPiece against the rule of llama.cpp, written out."""

import json
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import processors

from qkv.checkpoints.gguf_tokenizer import tokenizer_metadata
from qkv.data import tokenizer_from_gguf
from qkv.errors import QkvError
from qkv.zoo.gguf import WORDS


def pairs(pre_tokenizer: dict[str, Any] | None, **others: Any) -> dict[str, Any]:
    """A small tokenizer.json."""
    return {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "pre_tokenizer": pre_tokenizer,
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": True},
            {"id": 5, "content": "<think>", "special": False},
        ],
        **others,
    }


LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def cuts(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**LEVEL, "use_regex": False}]}


def test_a_tokenizer_json_becomes_metadata() -> None:
    frame = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "first"}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"first": {"id": "first", "ids": [3], "tokens": ["<s>"]}},
    }  # fmt: skip
    found = tokenizer_metadata(
        pairs(LEVEL, post_processor={"type": "Sequence", "processors": [LEVEL, frame]}),
        {"bos_token": {"content": "<s>"}, "eos_token": "<s>", "unk_token": None, "chat_template": "{{ x }}"},
        size=7,
    )
    assert found == {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "[PAD4]", "<think>", "[PAD6]"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 5, 4, 5], "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3, "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.chat_template": "{{ x }}",
    }  # fmt: skip
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, LEVEL]}
    named = {"smollm": digits, "llama-bpe": cuts(WORDS % "{1,3}"), "qwen2": cuts(WORDS % "")}
    for name, pre_tokenizer in named.items():
        assert tokenizer_metadata(pairs(pre_tokenizer))["tokenizer.ggml.pre"] == name
    several = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    found = tokenizer_metadata(pairs(LEVEL), {"chat_template": several, "add_bos_token": True})
    assert found["tokenizer.chat_template"] == "x" and found["tokenizer.chat_template.tool_use"] == "y"
    assert found["tokenizer.chat_templates"] == ["tool_use"] and found["tokenizer.ggml.add_bos_token"]
    for bad in (pairs(cuts("x")), pairs(None), {**pairs(LEVEL), "model": {"type": "WordPiece"}}):
        with pytest.raises(QkvError, match="which is none of GGUF's kinds that are written here"):
            tokenizer_metadata(bad)
    with pytest.raises(QkvError, match="the id 5, and the model only 4 rows"):
        tokenizer_metadata(pairs(LEVEL), size=4)


# --- WordPiece ---

TEXTS = (
    "The Café serves naïve Résumé plates, e\u0301 too!", "你好 World 漢字", "UPPER lower Mixed don't (x) a-b",
    "unbelievable things are unthinkable",
)  # fmt: skip
HARD = (*TEXTS, "snow ☃ Weiß", "thingsthingsthe", "[CLS] ÀÉ àé", "a\tb\nc\u3000d\u00a0e", "ΑΒΓ and the $5+", "", " ")
SPECIALS = ["<x>", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]


FORMS = pytest.mark.parametrize("lowercase, accents", [(True, None), (False, None), (True, False), (False, True)])


def words(lowercase: bool = True, accents: bool | None = None) -> dict[str, Any]:
    """A small BERT's tokenizer.json, whose special tokens have other ids than BERT's."""
    made = tokenizers.BertWordPieceTokenizer(lowercase=lowercase, strip_accents=accents)
    options = {"vocab_size": 150, "min_frequency": 1, "show_progress": False}
    made.train_from_iterator(TEXTS * 20, special_tokens=SPECIALS, **options)
    made._tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 4))
    return json.loads(made.to_str())


def cut_as_llama_cpp_does(metadata: dict[str, Any], cleaned: list[str]) -> list[int]:
    """Each word with ▁ before it: the longest token from where the last one ended, or the unknown one for all of it."""
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    found = [metadata["tokenizer.ggml.bos_token_id"]]
    for word in cleaned:
        rest, pieces = f"▁{word}", list[int]()
        while rest:
            end = next((n for n in range(len(rest), 0, -1) if rest[:n] in ids), 0)
            if not end:
                pieces = [metadata["tokenizer.ggml.unknown_token_id"]]
                break
            pieces.append(ids[rest[:end]])
            rest = rest[end:]
        found += pieces
    return [*found, metadata["tokenizer.ggml.seperator_token_id"]]


@FORMS
def test_word_pieces_are_cut_as_before(lowercase: bool, accents: bool | None) -> None:
    said = words(lowercase, accents)
    theirs, metadata = tokenizers.Tokenizer.from_str(json.dumps(said)), tokenizer_metadata(said)
    for text in HARD:
        clean = theirs.pre_tokenizer.pre_tokenize_str(theirs.normalizer.normalize_str(text))
        ids = theirs.encode(text.replace("[CLS]", "[ CLS ]")).ids
        assert cut_as_llama_cpp_does(metadata, [word for word, _ in clean]) == ids, text
    kept = {key: value for key, value in metadata.items() if ".normalizer." in key}
    strips = lowercase if accents is None else accents
    said = {"tokenizer.ggml.normalizer.lowercase": lowercase, "tokenizer.ggml.normalizer.strip_accents": strips}
    assert kept == ({} if lowercase and strips else said)  # llama.cpp drops both where it is not told


@FORMS
def test_word_pieces_are_read_back(lowercase: bool, accents: bool | None) -> None:
    said = words(lowercase, accents)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(said))
    ours = tokenizer_from_gguf(tokenizer_metadata(said, size=theirs.get_vocab_size() + 2))
    for text in HARD:
        assert ours.prompt(text.replace("[CLS]", "cls")).ids == theirs.encode(text.replace("[CLS]", "cls")).ids, text
    assert ours.mask == 5 and ours.pad == 3 and ours.unknown == 1


def test_a_bert_s_metadata() -> None:
    said = words()
    vocabulary = {text: i for text, i in said["model"]["vocab"].items() if i < len(SPECIALS)}
    said["model"]["vocab"] = {**vocabulary, "the": 6, "##ing": 7, "#": 8, "##": 9, "[unused0]": 10}
    found = tokenizer_metadata(said, {"mask_token": "<x>"}, size=12)
    assert found == {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [*SPECIALS, "▁the", "ing", "▁#", "▁##", "▁[unused0]", "[PAD11]"],
        "tokenizer.ggml.token_type": [3, 3, 3, 3, 3, 3, 1, 1, 1, 1, 1, 5],
        "tokenizer.ggml.bos_token_id": 4, "tokenizer.ggml.cls_token_id": 4, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 2, "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1, "tokenizer.ggml.mask_token_id": 0,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_sep_token": True,
    }  # fmt: skip
    known = {value for value in vars(gguf.Keys.Tokenizer).values() if isinstance(value, str)}
    assert found.keys() - known == {"tokenizer.ggml.cls_token_id"}  # which older readers ask for


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"normalizer": {"type": "Lowercase"}}, "does not clean a text as BERT does"),
        ({"normalizer": None}, "does not clean a text as BERT does"),
        ({"normalizer": {"type": "BertNormalizer", "clean_text": False}}, "does not clean a text"),
        ({"normalizer": {"type": "BertNormalizer", "handle_chinese_chars": False}}, "set Chinese characters apart"),
        ({"post_processor": None}, "does not set its cls and sep tokens around a text"),
        ({"added_tokens": [{"id": 7, "content": "the", "special": False}]}, "adds words that are no special tokens"),
        ({"model": {"continuing_subword_prefix": "@@"}}, "marks the pieces that go on otherwise"),
        ({"model": {"unk_token": "[NONE]"}}, "lacks its unknown token"),
        ({"model": {"vocab": {**{t: i for i, t in enumerate(SPECIALS)}, "x": 6, "##▁x": 7}}}, "would spell alike"),
    ],
)
def test_other_word_pieces_are_refused(change: dict[str, Any], sentence: str) -> None:
    said = words()
    inside = {"model": {**said["model"], **change["model"]}} if "model" in change else change
    with pytest.raises(QkvError, match=sentence):
        tokenizer_metadata({**said, **inside})
