"""The tokenizer that models use: roles, prompts, special tokens spelt out, and text that streams."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qkv.data.tokenizer import Tokenizer
from qkv.data.tokenizers import BPE, Character, Symbols, Unigram, Word, WordPiece, train_tokenizer
from qkv.errors import QkvError

TEXTS = [
    "The quick brown fox jumps over the lazy dog (twice).",
    "Don't pay $3.50, it's a well-known fox!",
    "我们在中国学习 AI 和机器学习。",
    "naïve café 🙂",
] * 3
SPECS = [Word(), Symbols(), Character(), BPE(400), WordPiece(200), Unigram(140)]


def bert() -> tokenizers.Tokenizer:
    """As BERT has it: word pieces, segments, and a decoder that cleans up."""
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "fox",
        "##es",
        ".",
        ",",
        "do",
        "n",
        "'",
        "t",
        "n't",
        "我",
    ]
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=True)
    made.add_special_tokens(words[:5])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def fallback() -> tokenizers.Tokenizer:
    """As LLaMA has it: ▁ for spaces, and bytes where the vocabulary has no character."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    merges = [("▁", "a"), ("▁a", "b")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


BERT = Tokenizer(bert(), {"pad": 0, "unknown": 1, "begin": 2, "end": 3, "mask": 4})
LLAMA = Tokenizer(fallback(), {"unknown": 0, "begin": 1, "end": 2}, ends=[0])
ALL = {"bert": BERT, "llama": LLAMA} | {spec.kind: train_tokenizer(spec, TEXTS) for spec in SPECS}


def test_roles_are_ids_or_an_error_that_names_them() -> None:
    assert (BERT.begin, BERT.end, BERT.mask, BERT.pad, BERT.unknown) == (2, 3, 4, 0, 1)
    assert LLAMA.has("begin") and not LLAMA.has("mask")
    with pytest.raises(QkvError, match="has no mask token, which is needed here; it has unknown, begin, end"):
        _ = LLAMA.mask
    assert LLAMA.ends == {0, 2} and BERT.ends == {3} and ALL["bpe"].ends == {3}
    assert LLAMA.names == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for roles, ends in [({"end": 264}, []), ({}, [-1]), ({}, [2**40])]:
        with pytest.raises(QkvError, match="the end token has the id"):
            Tokenizer(fallback(), roles, ends=ends)


def test_size_counts_gaps_and_added_tokens() -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a"))
    made.add_tokens([AddedToken("<tool>")])
    assert Tokenizer(made, {}).size == 10
    with pytest.raises(QkvError, match="ids go up to 4000000000, and it has 2 tokens"):
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 4_000_000_000}, "a")), {})


def test_a_prompt_has_what_the_post_processor_adds() -> None:
    """Against the transformers package."""
    reference = PreTrainedTokenizerFast(tokenizer_object=bert())
    for pair in (("the foxes.", None), ("the foxes", "我 don't"), ("", "x")):
        given = [text for text in pair if text is not None]
        expected = reference(
            *given, return_offsets_mapping=True, return_special_tokens_mask=True, return_token_type_ids=True
        )
        found = BERT.prompt(*pair)
        assert found.ids == expected["input_ids"]
        assert found.segments == expected["token_type_ids"]
        assert found.offsets == [tuple(span) for span in expected["offset_mapping"]]
        assert found.specials == [special == 1 for special in expected["special_tokens_mask"]]
    assert BERT.prompt("the", "fox").ids == [2, 5, 3, 6, 3]
    assert [ALL["bpe"].prompt(text).ids for text in TEXTS] == ALL["bpe"].encode_batch(TEXTS)
    assert BERT.prompt("我 the").offsets == [(0, 0), (0, 1), (2, 5), (0, 0)]


def test_only_parse_finds_special_tokens_and_it_adds_none() -> None:
    assert BERT.parse("the [MASK] fox[SEP]") == [5, 4, 6, 3]
    assert not {2, 3, 4} & set(BERT.encode("the [MASK] fox[SEP]"))
    assert BERT.prompt("[MASK]", "[SEP]").ids.count(3) == 2 and 4 not in BERT.prompt("[MASK]").ids
    assert LLAMA.parse("<s>ab</s>") == [1, LLAMA.encode("ab")[0], 2]
    bpe = ALL["bpe"]
    assert bpe.parse("<s>fox<mask></s>") == [bpe.begin, *bpe.encode("fox"), bpe.mask, bpe.end]


def unigram() -> Tokenizer:
    """Unigrams that know their special tokens as pieces, as converted ones do, and a token that is no special one."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("<x>", 0.0),
        *((character, -3.0) for character in "▁</s>xuntabk"),
        ("ab", -2.0),
    ]
    made = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>", "<x>"])
    made.add_tokens([AddedToken("<tool>", special=False)])
    return Tokenizer(made, {"unknown": 0, "end": 1})


def test_a_model_that_has_its_special_tokens_as_pieces_does_not_give_them_to_text() -> None:
    made = unigram()
    for text in ("ab</s>", "<x><x>ab", "a<unk>b", "</s>"):
        ids = made.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert made.decode(ids) == text and made.prompt(text).ids == ids
    assert made.encode("ab") == made.encode_batch(["</s>", "ab"])[1] and len(made.encode("ab")) == 2
    assert made.encode("?") == [made.parse("?")[0], 0] and made.parse("ab</s>")[-1] == 1
    assert made.pieces(made.encode("a<tool>"))[-1] == "<tool>"


@pytest.mark.parametrize("kind", ALL)
def test_a_stream_gives_what_decoding_all_ids_gives(kind: str) -> None:
    tokenizer = ALL[kind]

    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(0, tokenizer.size - 1), max_size=60), st.sampled_from(TEXTS))
    def check(ids: list[int], text: str) -> None:
        for row in (ids, tokenizer.encode(text), [*tokenizer.encode(text), *ids, *tokenizer.encode(text)]):
            stream = tokenizer.stream()
            parts = [*map(stream.push, row), stream.close()]
            assert "".join(parts) == tokenizer.decode(row)
            again = stream.push(row[0]) + stream.close() if row else ""
            assert again == tokenizer.decode(row[:1])

    check()


def test_a_stream_holds_back_half_a_character_and_no_more() -> None:
    for tokenizer in (ALL["bpe"], LLAMA):
        ids = tokenizer.encode("ab 🙂好ab")
        stream = tokenizer.stream()
        parts = list(map(stream.push, ids))
        assert "�" not in "".join(parts)
        assert [part.strip() for part in parts if "🙂" in part or "好" in part] == ["🙂", "好"]
        assert stream.close() == ""
        broken = tokenizer.encode("🙂")[:-1]
        assert [stream.push(i) for i in broken][-1] == ""
        assert stream.close().endswith("�")


@pytest.mark.parametrize("kind", ["llama", "bpe", "bert"])
def test_a_stream_looks_at_few_ids_however_long_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, looked, decode = ALL[kind], [], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: looked.append(len(ids)) or decode(self, ids))
    stream = tokenizer.stream()
    for i in [*range(3, tokenizer.size), *[130] * 200] * 3:
        stream.push(i % tokenizer.size)
    assert max(looked) <= 24


def test_broken_bytes_spoil_no_other_character() -> None:
    ids = LLAMA.encode("好")[1:]
    assert LLAMA.decode([*ids, ids[0], 260, *ids]) == "好�a好"
    assert LLAMA.decode([*ids, *ids, ids[1]]) == "好好�"
    assert LLAMA.decode([1, *ids[:2], 2, *ids[2:]]) == "好"  # special tokens are dropped first, as the library does
    for text in ("ab 好 ▁", "  ab", "🙂🙂 a\n"):
        assert LLAMA.decode(LLAMA.encode(text)) == bytes_decoded(text)


def bytes_decoded(text: str) -> str:
    return fallback().decode(fallback().encode(text).ids)


def test_pieces_of_bytes_stand_where_their_character_ends() -> None:
    assert LLAMA.pieces(LLAMA.encode("ab 好")) == [" ab", "␣", "…", "…", "好"]
    assert LLAMA.pieces([*LLAMA.encode("好")[:3], 2, 260, 9999]) == ["␣", "…", "…", "</s>", "a", "<9999>"]
    assert BERT.pieces(BERT.encode("foxes")) == ["fox", "##es"]


def test_saved_into_a_folder_or_a_file(tmp_path: Path) -> None:
    BERT.save(tmp_path)
    BERT.save(tmp_path / "other.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("the foxes").ids == BERT.prompt("the foxes").ids
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"] is None


def test_threads_do_not_disturb_each_other() -> None:
    """One reads special tokens and the other does not; neither may switch the library for both."""
    text = "the [MASK] fox"
    expected = [BERT.encode(text), BERT.parse(text)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: (BERT.parse if n % 2 else BERT.encode)(text), range(400)))
    assert found == expected * 200


def test_half_a_surrogate_pair_is_no_text() -> None:
    for read in (BERT.encode, BERT.prompt, BERT.parse):
        with pytest.raises(QkvError, match="half of a surrogate pair"):
            read("\ud83d")
