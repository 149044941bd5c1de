"""Published tokenizers, against the transformers and sentencepiece packages and against their rules written out."""

import io
import json
import random
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from qkv.checkpoints.gguf_export import tokenizer_metadata
from qkv.data import load_tokenizer, tokenizer_from_gguf, tokenizer_from_llama2c
from qkv.data.tokenizer import Tokenizer
from qkv.errors import QkvError

LINES = [line for topic in list(topics.values())[:30] for line in topic.split("\n") if line.strip()][:1500]
LINES += [
    "Der schnelle Fuchs über",
    "我爱你，你爱我。",
    "日本語のテキスト",
    "naïve café déjà vu",
    "12345 67.89 $3.50",
] * 20


def hard() -> list[str]:
    """Spaces, line ends, emoji, East Asian text, digits, accents, and lines of the training text cut anywhere."""
    texts = [
        *("", " ", "   ", "Hello world!", " leading", "trailing  ", "two  spaces   three", "\ttab\nnew\n\n  line\r\n"),
        *(
            "你好，世界",
            "🙂 emoji 👩‍👩‍👧",
            "ﬁ ligature ½ ①",
            "1234567 3.50",
            "naïve café",
            "a<0x41>",
            "Ａｂｃ　ｗｉｄｅ",
        ),
        *("e\u0301 combining", "\u00a0nbsp\u200bzw", "DON'T we'LL", "x= (a+b)^2 -- ...!?", "aaaaaaa", "_a_b_"),
    ]
    draw, running = random.Random(0), "\n".join(LINES)
    for _ in range(60):
        start = draw.randrange(len(running) - 80)
        texts.append(running[start : start + draw.randrange(1, 80)])
        texts.append("".join(draw.choices([" ", "  ", "a", "e", "the", "ing", "你", "ü", "🙂", "\n", "0", "."], k=12)))
    return texts


HARD = hard()


@cache
def trained(**options: Any) -> bytes:
    """A SentencePiece model."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=file, minloglevel=2, vocab_size=700, **options
    )
    return file.getvalue()


PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99, **PLAIN}
GEMMA = {**LLAMA, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "split_digits": True}
T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
ALBERT = {"model_type": "unigram", "pad_id": 0, "unk_id": 1, "eos_id": -1, "bos_id": -1}
ALBERT |= {"control_symbols": "[CLS],[SEP]", "user_defined_symbols": "[MASK]"}


def write(folder: Path, **files: Any) -> Path:
    """Files by name, with __ for the dot; tables become JSON."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


# --- SentencePiece --------------------------------------------------------------------------------------------------

KINDS = {
    "llama": ("tokenizer__model", LLAMA),
    "gemma": ("tokenizer__model", {**GEMMA, "user_defined_symbols": "<tool>,\n,\n\n"}),
    "normalised byte pairs": ("tokenizer__model", {"model_type": "bpe"}),
    "t5": ("spiece__model", T5),
    "plain unigrams": ("spiece__model", {**T5, **PLAIN}),
    "unigrams with bytes": ("spiece__model", {**T5, "byte_fallback": True, "character_coverage": 0.98}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_those_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    file, given = KINDS[kind]
    data = trained(**given)
    tokenizer = load_tokenizer(write(tmp_path, **{file: data}))
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert [text for text in HARD if tokenizer.encode(text) != reference.encode(text)] == []
    for text in HARD:
        ids = tokenizer.encode(text)
        if not tokenizer.has("unknown") or tokenizer.unknown not in ids:
            assert tokenizer.decode(ids) == reference.decode(ids)


FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "T5": ("t5", "spiece__model", T5, {}),
    "Albert": ("albert", "spiece__model", ALBERT, {}),
    "XLMRoberta": ("xlm-roberta", "sentencepiece.bpe__model", {"model_type": "unigram"}, {}),
    "Llama": ("llama", "tokenizer__model", LLAMA, {"add_bos_token": True, "legacy": False}),
}


def compare(folder: Path) -> Tokenizer:
    """Prompts, pairs, special tokens and roles against the transformers package."""
    tokenizer, reference = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert [text for text in HARD if tokenizer.prompt(text).ids != reference(text)["input_ids"]] == []
    pair = tokenizer.prompt("The first text", "and a second")
    found = reference("The first text", "and a second", return_token_type_ids=True)
    assert (pair.ids, pair.segments) == (found["input_ids"], found["token_type_ids"])
    assert tokenizer.size == len(reference)
    mask = reference.mask_token or reference.eos_token
    spelt = f"The {mask} text{reference.eos_token or reference.sep_token} and more"
    assert tokenizer.parse(spelt) == reference(spelt, add_special_tokens=False)["input_ids"]
    for role, name in (("end", "eos"), ("pad", "pad"), ("mask", "mask")):
        if (i := getattr(reference, f"{name}_token_id")) is not None:
            assert getattr(tokenizer, role) == i
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_sentencepiece(family: str, tmp_path: Path) -> None:
    kind, file, given, config = FAMILIES[family]
    named = {
        "tokenizer_config__json": {"tokenizer_class": f"{family}Tokenizer", **config},
        "config__json": {"model_type": kind},
    }
    tokenizer = compare(write(tmp_path, **{file: trained(**given)}, **named))
    if family == "T5":
        assert tokenizer.parse("<extra_id_0>a<extra_id_99>")[0] == 799
    assert tokenizer.encode("</s>") != [tokenizer.end]


# --- vocabularies and merges ----------------------------------------------------------------------------------------


def word_pieces(folder: Path, **config: Any) -> Path:
    made = tokenizers.BertWordPieceTokenizer(lowercase=True)
    made.train_from_iterator(LINES, vocab_size=700, show_progress=False)
    made.save_model(str(folder))
    config = {"tokenizer_class": "BertTokenizer", **config}
    return write(folder, tokenizer_config__json=config, config__json={"model_type": "bert"})


def byte_pairs(folder: Path, specials: list[str], family: str, kind: str, **config: Any) -> Path:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(LINES, vocab_size=700, show_progress=False, special_tokens=specials)
    made.save_model(str(folder))
    config = {"tokenizer_class": f"{family}Tokenizer", **config}
    return write(folder, tokenizer_config__json=config, config__json={"model_type": kind})


def test_bert(tmp_path: Path) -> None:
    compare(word_pieces(tmp_path))


def test_bert_that_keeps_its_case(tmp_path: Path) -> None:
    compare(word_pieces(tmp_path, do_lower_case=False, tokenize_chinese_chars=False))


def test_gpt2_with_tokens_added(tmp_path: Path) -> None:
    decoder = {"700": {"content": "<tool>", "special": False}, "701": {"content": "[PAD]", "special": True}}
    folder = byte_pairs(tmp_path, ["<|endoftext|>"], "GPT2", "gpt2", added_tokens_decoder=decoder, pad_token="[PAD]")
    tokenizer = compare(folder)
    assert (tokenizer.pad, tokenizer.begin, tokenizer.ends) == (701, 0, {0})
    assert tokenizer.encode("a<tool>")[-1] == 700 and tokenizer.encode("[PAD]") != [701]
    write(folder, added_tokens__json={"<tool>": 701})
    with pytest.raises(QkvError, match="the added token '<tool>' is said to have the id 701, and it has 700"):
        load_tokenizer(folder)


def test_roberta_whose_mask_eats_the_space_before_it(tmp_path: Path) -> None:
    mask = {"content": "<mask>", "lstrip": True, "special": True, "__type": "AddedToken"}
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = compare(byte_pairs(tmp_path, specials, "Roberta", "roberta", mask_token=mask))
    assert tokenizer.parse("a <mask>") == [*tokenizer.encode("a"), tokenizer.mask]
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path).names == tokenizer.names


def test_qwen2(tmp_path: Path) -> None:
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    tokenizer = compare(byte_pairs(tmp_path, ["<|endoftext|>", "<|im_end|>"], "Qwen2", "qwen2", **config))
    assert not tokenizer.has("begin")


# --- tokenizer.json and what stands beside it -----------------------------------------------------------------------


def whole(folder: Path, **config: Any) -> Path:
    """As LLaMA 3 has it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|end|>", "<|eot|>"]
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    made.enable_padding(length=7)
    made.enable_truncation(5)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>", **config}
    return write(folder, tokenizer_config__json=config)


def test_tokenizer_json_with_its_neighbours(tmp_path: Path) -> None:
    folder = write(whole(tmp_path), generation_config__json={"eos_token_id": [1, 2]})
    write(folder, special_tokens_map__json={"pad_token": {"content": "<|eot|>"}, "eos_token": "<|begin|>"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.names == {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|eot|>"}
    assert tokenizer.ends == {1, 2} and tokenizer.size == 500 and not tokenizer.templates
    long = "The quick brown fox " * 9
    assert tokenizer.prompt(long).ids == [0, *tokenizer.encode(long)]
    again = folder / "again"
    again.mkdir()
    tokenizer.save(again)
    assert load_tokenizer(again).prompt(long).ids == tokenizer.prompt(long).ids
    assert load_tokenizer(write(folder, generation_config__json={"eos_token_id": 2})).ends == {1, 2}


def test_tokenizer_json_itself_says_what_stands_around_a_text(tmp_path: Path) -> None:
    folder = whole(tmp_path, add_bos_token=False, add_eos_token=True)
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.prompt("a").ids == theirs("a", truncation=False, padding=False)["input_ids"]
    assert tokenizer.prompt("a").ids == [0, *tokenizer.encode("a")]


def test_chat_templates(tmp_path: Path) -> None:
    assert load_tokenizer(whole(tmp_path, chat_template="{{ 1 }}")).templates == {"default": "{{ 1 }}"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert load_tokenizer(whole(tmp_path, chat_template=named)).templates == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.jinja").write_text("ç", encoding="utf-8")
    assert load_tokenizer(tmp_path).templates == {"default": "ç", "tool_use": "b"}
    with pytest.raises(QkvError, match="chat_template is neither text nor a list of named texts"):
        load_tokenizer(whole(tmp_path, chat_template=[{"name": 1}]))


# --- GGUF -----------------------------------------------------------------------------------------------------------

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
AS_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2_CUT = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {  # as the tokenizer.json files of these families have it
    "gpt-2": GPT2_CUT,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2_CUT]),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), AS_BYTES]),
    "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), AS_BYTES]),
}


@cache
def gpt2_json(pre: str) -> str:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = CUTS.get(pre, GPT2_CUT)
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    return str(made.to_str())


def gguf_bytes(pre: str, **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a tokenizer of byte pairs."""
    model = json.loads(gpt2_json(pre))
    tokens = [*sorted(model["model"]["vocab"], key=model["model"]["vocab"].__getitem__), "<tool>"]
    merges = [" ".join(merge) for merge in model["model"]["merges"]]
    keys = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 4) + [4]}
    keys |= {
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "add_bos_token": False,
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()} | {"tokenizer.chat_template": "{{ 1 }}"}


@pytest.mark.parametrize("pre", CUTS)
def test_gguf_of_byte_pairs(pre: str) -> None:
    """Against the tokenizer.json of the same vocabulary."""
    tokenizer, reference = tokenizer_from_gguf(gguf_bytes(pre)), tokenizers.Tokenizer.from_str(gpt2_json(pre))
    assert [text for text in HARD if tokenizer.encode(text) != reference.encode(text).ids] == []
    spelt = "<|im_start|>user\nHi <tool><|im_end|>\n"
    assert tokenizer.parse(spelt) == reference.encode(spelt).ids
    assert tokenizer.ends == {0, 2} and (tokenizer.begin, tokenizer.end, tokenizer.pad) == (1, 2, 2)
    assert tokenizer.templates == {"default": "{{ 1 }}"} and not tokenizer.has("mask")
    assert tokenizer.prompt("a").ids == tokenizer.encode("a")
    for text in HARD:
        assert tokenizer.decode(tokenizer.encode(text)) == (
            text if pre != "qwen2" else normalizers.NFC().normalize_str(text)
        )


def test_gguf_of_byte_pairs_that_says_little() -> None:
    """Without tokenizer.ggml.pre, words are cut as llama.cpp cuts them then; LLaMA 3's begins every prompt."""
    keys = gguf_bytes("gpt-2")
    del keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_from_gguf(keys)
    whole_words = [piece for text in HARD for piece in tokenizer.pieces(tokenizer.encode(text))]
    assert not any(piece.strip("0123456789") == "" and len(piece) > 3 for piece in whole_words)
    assert tokenizer.prompt("a").ids == tokenizer.encode("a")
    keys["tokenizer.ggml.pre"] = "llama-v3"
    assert tokenizer_from_gguf(keys).prompt("a").ids == [1, *tokenizer.encode("a")]
    with pytest.raises(
        QkvError, match="the GGUF file cuts words as 'poro-chat' does; default, gpt-2, smollm, llama-bpe"
    ):
        tokenizer_from_gguf({**keys, "tokenizer.ggml.pre": "poro-chat"})


def gguf_pieces(**more: Any) -> tuple[dict[str, Any], sentencepiece.SentencePieceProcessor]:
    """What llama.cpp's converter writes for a SentencePiece model."""
    given = GEMMA if more.get("add_space_prefix") is False else LLAMA
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained(**given))
    ids = range(reference.get_piece_size())
    kinds = [
        2 if reference.is_unknown(i) else 3 if reference.is_control(i) else 6 if reference.is_byte(i) else 1
        for i in ids
    ]
    keys = {"model": "llama", "tokens": [reference.id_to_piece(i) for i in ids], "token_type": kinds}
    keys |= {"scores": [reference.get_score(i) for i in ids], "bos_token_id": 1, "eos_token_id": 2} | more
    keys |= {"unknown_token_id": 0}
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}, reference


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_of_sentencepiece(prefix: bool) -> None:
    keys, reference = gguf_pieces(add_space_prefix=prefix)
    tokenizer = tokenizer_from_gguf(keys)
    assert [text for text in HARD if tokenizer.encode(text) != reference.encode(text)] == []
    assert [text for text in HARD if tokenizer.decode(tokenizer.encode(text)) != text] == []
    assert tokenizer.prompt("a").ids == [1, *reference.encode("a")]
    assert tokenizer.parse("<s>a</s>") == [1, *reference.encode("a"), 2]
    if prefix:  # as in llama.cpp, what follows a special token begins anew
        assert tokenizer.parse("a</s>b") == [*reference.encode("a"), 2, *reference.encode("b")]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_goes_back_into_gguf(prefix: bool, tmp_path: Path) -> None:
    keys, reference = gguf_pieces(add_space_prefix=prefix)
    tokenizer_from_gguf(keys).save(tmp_path)
    said = [json.loads((tmp_path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")]
    back = tokenizer_metadata(*said, size=len(keys["tokenizer.ggml.tokens"]) + 3)
    kinds = keys["tokenizer.ggml.token_type"]
    assert back["tokenizer.ggml.tokens"][:-3] == keys["tokenizer.ggml.tokens"]
    assert back["tokenizer.ggml.token_type"] == [*kinds, 5, 5, 5]
    assert back["tokenizer.ggml.add_bos_token"] and back["tokenizer.ggml.add_space_prefix"] is prefix
    again = tokenizer_from_gguf(back)
    assert [text for text in HARD if again.prompt(text).ids != [1, *reference.encode(text)]] == []


def test_merges_from_scores_are_exact() -> None:
    """Against the joining of the best neighbours written out, for scores in any order."""
    draw = random.Random(1)
    texts = ["".join(draw.choices("ab▁", k=20)) for _ in range(300)]
    for _ in range(5):
        words = {"".join(draw.choices("ab▁", k=draw.randrange(2, 6))) for _ in range(25)}
        pieces = ["<unk>", *"ab▁", *sorted(words)]
        scores = [0.0, -99.0, -99.0, -99.0, *map(float, draw.sample(range(-90, 0), len(words)))]
        keys = {"model": "llama", "tokens": pieces, "token_type": [2, *[1] * (len(pieces) - 1)], "scores": scores}
        tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
        best = dict(zip(pieces, scores, strict=True))
        for text in texts:
            cut = list("▁" + text)
            while True:
                pairs = [(best[a + b], -i) for i, (a, b) in enumerate(pairwise(cut)) if a + b in best]
                if not pairs:
                    break
                i = -max(pairs)[1]
                cut[i : i + 2] = [cut[i] + cut[i + 1]]
            assert tokenizer.encode(text) == [pieces.index(piece) for piece in cut]


def test_gguf_of_bert(tmp_path: Path) -> None:
    reference = load_tokenizer(word_pieces(tmp_path))
    words = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    marked = [w if w[0] + w[-1] == "[]" else w[2:] if w.startswith("##") else "▁" + w for w in words]
    keys = {"model": "bert", "tokens": marked, "token_type": [3 if "[" in w and len(w) > 2 else 1 for w in words]}
    keys |= {"cls_token_id": 2, "seperator_token_id": 3, "unknown_token_id": 1, "padding_token_id": 0}
    tokenizer = tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert [text for text in HARD if tokenizer.prompt(text, "b") != reference.prompt(text, "b")] == []
    assert tokenizer.names == reference.names and tokenizer.mask == 4


def test_llama2c() -> None:
    """Against llama2.c's rule written out, on bytes."""
    _, reference = gguf_pieces()
    pieces = [reference.id_to_piece(i).replace("▁", " ").encode() for i in range(reference.get_piece_size())]
    pieces[1:3], scores = [b"\n<s>\n", b"\n</s>\n"], [reference.get_score(i) for i in range(len(pieces))]
    tokenizer, place = tokenizer_from_llama2c(pieces, scores), {piece: i for i, piece in enumerate(pieces)}

    def written_out(text: str) -> list[int]:
        ids = [place[b" "]] if text else []
        for character in text:
            raw = character.encode()
            ids += [place[raw]] if raw in place else [byte + 3 for byte in raw]
        while True:
            joined = [(place.get(pieces[a] + pieces[b]), i) for i, (a, b) in enumerate(pairwise(ids))]
            best = max(((scores[i], -at, i) for i, at in joined if i is not None), default=None)
            if best is None:
                return ids
            ids[-best[1] : 2 - best[1]] = [best[2]]

    assert [text for text in HARD if tokenizer.encode(text) != written_out(text)] == []
    assert tokenizer.prompt("a").ids == [1, *written_out("a")] and tokenizer.decode([1, *written_out("a b")]) == "a b"
    with pytest.raises(QkvError, match="3 pieces with 3 scores are no tokenizer of llama2.c"):
        tokenizer_from_llama2c(pieces[:3], scores[:3])


# --- what is wrong --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "has no tokenizer: tokenizer.json, vocab.txt"),
    "code": (
        {"tokenizer_config__json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}},
        "Python code of its own .* which is not run",
    ),
    "deep": ({"tokenizer__json": b'{"a":' * 100_000}, r"tokenizer\.json is no tokenizer file"),
    "deep configuration": ({"tokenizer_config__json": b'{"a":' * 100_000}, r"tokenizer_config\.json is no JSON"),
    "a list": ({"tokenizer_config__json": [1]}, "holds no JSON object"),
    "not UTF-8": ({"special_tokens_map__json": b"\xff"}, "is not UTF-8"),
    "wrong types": ({"tokenizer__json": {"version": 1, "model": []}}, r"tokenizer\.json is no tokenizer file"),
    "nonsense": ({"tokenizer__json": bytes(range(256)) * 4000}, r"tokenizer\.json is no tokenizer file"),
    "no pieces": ({"spiece__model": b""}, "holds no pieces of unigrams"),
    "cut off": ({"spiece__model": b"\x0a\xff\x01aa"}, "it is cut off"),
    "endless number": ({"spiece__model": b"\xff" * 99}, "a number in it is too long"),
    "group": ({"tokenizer__model": b"\x0b\x01"}, r"tokenizer\.model is no SentencePiece model"),
    "another class": (
        {"vocab__txt": b"a", "tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer"}},
        "is a BertJapaneseTokenizer, which is read from tokenizer.json alone",
    ),
    "no [CLS]": ({"vocab__txt": b"a\n[UNK]\n[SEP]\n"}, "tokens that begin and end a prompt are not in the vocabulary"),
    "no vocabulary": ({"vocab__json": {"a": -1}, "merges__txt": b""}, "its tokenizer cannot be read"),
    "foreign merges": ({"vocab__json": {"a": 0}, "merges__txt": b"#version\nb c\n"}, "its tokenizer cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_directory_that_is_wrong(name: str, tmp_path: Path) -> None:
    files, said = WRONG[name]
    with pytest.raises(QkvError, match=said) as caught:
        load_tokenizer(write(tmp_path, **files))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_longer_than_any_tokenizer(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(QkvError, match=r"tokenizer\.json is 1,000,000,000,000 bytes long, at most 64,000,000 are read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config__json": {"eos_token": 3}}, "eos_token is '3', a token is expected"),
        ({"generation_config__json": {"eos_token_id": "a"}}, r"says eos_token_id = \['a'\], which are no ids"),
        ({"generation_config__json": {"eos_token_id": 500}}, "the end token has the id 500"),
        ({"added_tokens__json": {"new": 900}}, "'new' is said to have the id 900, and it has 500"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": "new"}}}, "is said to have the id 'x'"),
        ({"tokenizer_config__json": {"chat_template": 5}}, "chat_template is neither text"),
    ],
)
def test_neighbours_that_are_wrong(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(QkvError, match=said):
        load_tokenizer(write(whole(tmp_path), **files))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model", "rwkv", "is of the kind 'rwkv'; gpt2, llama and bert are known"),
        ("model", None, r"tokenizer\.ggml\.model is 'None'; str is expected"),
        ("tokens", ["a", 1], r"tokenizer\.ggml\.tokens must hold a list of the type str"),
        ("tokens", ["a"], r"token_type must hold 1 values, one for each token"),
        ("scores", [1.0], r"tokenizer\.ggml\.scores must hold 700 values"),
        ("eos_token_id", 700, "the end token has the id 700"),
        ("eos_token_id", -1, r"tokenizer\.ggml\.eos_token_id is -1, which is no id"),
        ("bos_token_id", 2**63, r"tokenizer\.ggml\.bos_token_id is 9223372036854775808, which is no id"),
        ("bos_token_id", True, r"bos_token_id is 'True'; int is expected"),
        ("add_bos_token", 1, r"add_bos_token is '1'; bool is expected"),
    ],
)
def test_metadata_that_is_wrong(key: str, value: Any, said: str) -> None:
    keys, _ = gguf_pieces()
    with pytest.raises(QkvError, match=said) as caught:
        tokenizer_from_gguf({**keys, f"tokenizer.ggml.{key}": value})
    assert "\n" not in str(caught.value)


def test_pieces_that_are_wrong() -> None:
    keys, _ = gguf_pieces()
    tokens = keys["tokenizer.ggml.tokens"]
    with pytest.raises(QkvError, match=f"the pieces 5 and 699 are both spelt {tokens[5]!r}"):
        tokenizer_from_gguf({**keys, "tokenizer.ggml.tokens": [*tokens[:-1], tokens[5]]})
    with pytest.raises(QkvError, match="its pieces are longer than those of any tokenizer known"):
        tokenizer_from_gguf({**keys, "tokenizer.ggml.tokens": [*tokens[:-1], "a" * 20_000]})
    with pytest.raises(QkvError, match="the GGUF file's tokenizer cannot be made"):
        tokenizer_from_gguf(gguf_bytes("gpt-2", merges=["a", "b c d"]))


def test_no_torch_is_imported() -> None:
    code = "import sys, qkv.data.pretrained, qkv.data.chat, qkv.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
