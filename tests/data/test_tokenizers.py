"""Tokenisers: what comes back, what each kind cuts, and that the same text trains the same one."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.data.tokenizers import (
    BPE,
    SPECIALS,
    Character,
    Symbols,
    Tokenizer,
    TokenizerSpec,
    Unigram,
    Word,
    WordPiece,
    train_tokenizer,
)
from qkv.errors import QkvError
from qkv.spec import dump, load

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Don't pay $3.50 (or more), it's a well-known fox!",
    "Der schnelle braune Fuchs springt über den faulen Hund.",
    "The fox and the dog: friends since 12:30?",
    "我爱你，你爱我。",
    "我们在中国学习 AI 和机器学习。",
    "日本語のテキスト",
] * 3
KINDS: list[TokenizerSpec] = [Word(), Symbols(), Character(), BPE(400), WordPiece(200), Unigram(160)]
TRAINED = {spec.kind: train_tokenizer(spec, TEXTS) for spec in KINDS}

any_kind = pytest.mark.parametrize("spec", KINDS, ids=[spec.kind for spec in KINDS])


def dense(text: str) -> str:
    return "".join(text.split())


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_bpe_gives_back_any_text(text: str) -> None:
    bpe = TRAINED["bpe"]
    assert bpe.decode(bpe.encode(text)) == text


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*SPECIALS, *"<s>/ ▁\ue000", "fox", "我", "##", "\n"])).map("".join))
def test_no_text_becomes_a_special_token(text: str) -> None:
    for kind, tokenizer in TRAINED.items():
        specials = [i for i in tokenizer.encode(text) if i < len(SPECIALS) and i != tokenizer.unknown]
        assert not specials, kind
    assert TRAINED["bpe"].decode(TRAINED["bpe"].encode(text)) == text


@any_kind
def test_what_decoding_changes_is_what_the_table_says(spec: TokenizerSpec) -> None:
    tokenizer = TRAINED[spec.kind]
    for text in TEXTS:
        back = tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.unknown not in tokenizer.encode(text)
        if spec.kind in ("bpe", "character", "symbols", "unigram"):
            assert back == text
        else:
            assert dense(back) == dense(text)
    blank = "The  quick\tbrown\nfox"
    back = tokenizer.decode(tokenizer.encode(blank))
    assert back == (
        blank if spec.kind == "bpe" else "The  quickbrownfox" if spec.kind == "character" else "The quick brown fox"
    )


@any_kind
def test_the_first_ids_are_the_special_tokens(spec: TokenizerSpec) -> None:
    tokenizer = TRAINED[spec.kind]
    ids = [tokenizer.pad, tokenizer.unknown, tokenizer.begin, tokenizer.end, tokenizer.mask]
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.pieces(ids) == list(SPECIALS)
    assert tokenizer.decode(ids) == ""
    assert tokenizer.encode("") == []
    fox = tokenizer.encode("fox")
    assert tokenizer.decode([tokenizer.begin, *fox, tokenizer.end, tokenizer.pad]) == "fox"
    assert max(max(row) for row in tokenizer.encode_batch(TEXTS)) < tokenizer.size


@any_kind
def test_training_is_deterministic_down_to_the_file(spec: TokenizerSpec, tmp_path: Path) -> None:
    files = set()
    for i in range(4):
        train_tokenizer(spec, iter(TEXTS)).save(tmp_path / f"{i}.json")
        files.add((tmp_path / f"{i}.json").read_bytes())
    assert len(files) == 1


@any_kind
def test_saving_and_loading_changes_nothing(spec: TokenizerSpec, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer = TRAINED[spec.kind]
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    texts = [*TEXTS, "<s> never seen ☃ </s>"]
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert loaded.size == tokenizer.size
    assert [loaded.decode(loaded.encode(text)) for text in texts] == [
        tokenizer.decode(tokenizer.encode(text)) for text in texts
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


@any_kind
def test_lowercase(spec: TokenizerSpec) -> None:
    lower = load({**dump(spec), "lowercase": True}, TokenizerSpec)
    tokenizer = train_tokenizer(lower, TEXTS)
    for text in TEXTS:
        assert dense(tokenizer.decode(tokenizer.encode(text))) == dense(text.lower())
        assert tokenizer.encode(text.upper().replace("SS", "ß")) == tokenizer.encode(text.lower().replace("ss", "ß"))


def test_words_punctuation_and_chinese_characters() -> None:
    word = TRAINED["word"]

    def cut(text: str) -> list[str]:
        return word.pieces(word.encode(text))

    assert cut(TEXTS[1]) == [
        "Don't",
        "pay",
        "$",
        "3.50",
        "(",
        "or",
        "more",
        ")",
        ",",
        "it's",
        "a",
        "well-known",
        "fox",
        "!",
    ]
    assert cut(TEXTS[5]) == [*"我们在中国学习", "AI", *"和机器学习。"]
    assert cut("The unseen fox") == ["The", "<unk>", "fox"]
    assert word.decode(word.encode("The unseen fox")) == "The fox"
    for text in ("The fox and the dog: friends since 12:30?", "我们在中国学习 AI 和机器学习。", "我爱你，你爱我。"):
        assert word.decode(word.encode(text)) == text


def test_word_takes_the_most_frequent_up_to_its_size() -> None:
    texts = ["a a a b b c c d"]
    assert train_tokenizer(Word(size=7), texts).pieces([5, 6]) == ["a", "b"]
    assert train_tokenizer(Word(size=7), texts).size == 7
    assert train_tokenizer(Word(min_frequency=2), texts).size == len(SPECIALS) + 3
    assert train_tokenizer(Symbols(min_frequency=3), texts).size == len(SPECIALS) + 1


def test_symbols_are_split_at_spaces_only() -> None:
    phones = train_tokenizer(Symbols(), ["K AE T", "don't, 我爱你"])
    assert phones.pieces(phones.encode("T AE  K")) == ["T", "AE", "K"]
    assert phones.pieces(phones.encode("don't, 我爱你")) == ["don't,", "我爱你"]
    assert phones.decode(phones.encode("T AE  K")) == "T AE K"


def test_characters_keep_spaces_and_line_ends() -> None:
    character = train_tokenizer(Character(), ["a b\n我"])
    assert character.pieces(character.encode("b a\n我")) == ["b", "␣", "a", "↵", "我"]
    assert character.decode(character.encode("b a\n我")) == "b a\n我"


def test_bpe_merges_the_most_frequent_pair_and_never_across_words() -> None:
    """Against byte pair encoding written out; of pairs as frequent the one of older tokens comes first."""
    text = "low low low low low lower lower newest newest newest newest newest newest widest widest widest"
    size = len(SPECIALS) + 256
    bpe = train_tokenizer(BPE(size + 12), [text])
    age = {piece: i for i, piece in enumerate(bpe.pieces(range(size))) if len(piece) == 1}
    age[" "] = age.pop("␣")
    words = [list(word) for word in re.findall(" ?[a-z]+", text)]
    for step in range(12):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        first, second = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        age[first + second] = size + step
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [first, second]:
                    word[i : i + 2] = [first + second]
    assert bpe.pieces(range(size, bpe.size)) == list(age)[-12:]
    assert bpe.pieces(bpe.encode(text)) == ["␣" if piece == " " else piece for word in words for piece in word]
    everything = train_tokenizer(BPE(2000), TEXTS)
    assert not [i for i in range(everything.size) if re.search(r"\S\s", everything.pieces([i])[0])]


def test_wordpiece_takes_the_longest_piece_first() -> None:
    """Against the greedy cut written out over its own vocabulary."""
    wordpiece = TRAINED["wordpiece"]
    vocabulary = dict(zip(wordpiece.pieces(range(wordpiece.size)), range(wordpiece.size), strict=True))
    assert len(vocabulary) == wordpiece.size <= 200
    for word in ["quick", "quickly", "quickfox", "overlazy", "springt", "the", "fohund"]:
        cut: list[str] = []
        start = 0
        while start < len(word):
            mark = "##" if start else ""
            ends = [end for end in range(start + 1, len(word) + 1) if mark + word[start:end] in vocabulary]
            cut = [*cut, mark + word[start : ends[-1]]] if ends else ["<unk>"]
            start = ends[-1] if ends else len(word)
        assert wordpiece.pieces(wordpiece.encode(word)) == cut
    assert wordpiece.pieces(wordpiece.encode("fox☃ dog")) == ["fox", "<unk>", "dog"]
    assert any(len(piece) > 4 for piece in vocabulary if piece not in SPECIALS)


def test_unigram_takes_the_likeliest_cut(tmp_path: Path) -> None:
    """Against every cut of a word, scored one by one."""
    unigram = TRAINED["unigram"]
    unigram.save(tmp_path / "t.json")
    saved = json.loads((tmp_path / "t.json").read_text())["model"]
    scores = {piece.replace("▁", " "): score for piece, score in saved["vocab"][len(SPECIALS) :]}

    def cuts(word: str) -> list[list[str]]:
        if not word:
            return [[]]
        ends = range(1, len(word) + 1)
        return [[word[:end], *rest] for end in ends if word[:end] in scores for rest in cuts(word[end:])]

    for word in [" quick", " foxes", " Fuchs", " lazydog", " 学习"]:
        best = max(sum(scores[piece] for piece in cut) for cut in cuts(word))
        found = [" " if piece == "␣" else piece for piece in unigram.pieces(unigram.encode(word[1:]))]
        assert sum(scores[piece] for piece in found) == pytest.approx(best)
    assert unigram.size <= 160


def test_pieces_can_be_read() -> None:
    bpe = train_tokenizer(BPE(265), ["the the the 我我我 the"])
    found = bpe.pieces(bpe.encode("the 我 é\n\t"))
    assert found[0] == "the"
    assert "".join(piece for piece in found if piece != "…").replace("␣", " ") == "the 我 é↵⇥"
    assert len(found) == len(bpe.encode("the 我 é\n\t"))
    broken = bpe.encode("é")[:1]
    assert bpe.pieces([*broken, bpe.end, *bpe.encode("a")]) == ["…", "</s>", "a"]
    assert bpe.pieces([bpe.size + 3]) == [f"<{bpe.size + 3}>"]


@any_kind
def test_no_text_is_no_tokenizer(spec: TokenizerSpec) -> None:
    for texts in ([], [""], ["", "  ", "\n"]):
        with pytest.raises(QkvError, match="there is no text to train a tokenizer on"):
            train_tokenizer(spec, texts)


def test_sizes_that_cannot_work() -> None:
    with pytest.raises(QkvError, match=r"a size of 260 is too small; at least 261 is needed"):
        BPE(260)
    with pytest.raises(QkvError, match=r"recipe: a size of 5 is too small"):
        load({"kind": "word", "size": 5}, TokenizerSpec, "recipe")
    for spec in (WordPiece(12), Unigram(12)):  # d h o t and ##e ##h ##i ##r; ▁ and d e h i o r t
        with pytest.raises(QkvError, match=r"size of 12 is too small .* take 13;"):
            train_tokenizer(spec, ["the dire hi oe"])
    with pytest.raises(QkvError, match="no token of the text is frequent enough"):
        train_tokenizer(Word(min_frequency=3), ["a b b"])


@any_kind
def test_vocabularies_keep_to_their_size(spec: TokenizerSpec) -> None:
    for size in (300, 350, 1000):
        sized = load({**dump(spec), "size": size}, TokenizerSpec)
        assert train_tokenizer(sized, TEXTS).size <= size


@any_kind
def test_a_fault_in_the_texts_comes_through(spec: TokenizerSpec) -> None:
    def texts() -> Iterator[str]:
        yield "good"
        raise QkvError("train.tsv line 2: bad")

    with pytest.raises(QkvError, match=r"^train\.tsv line 2: bad$"):
        train_tokenizer(spec, texts())


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(QkvError, match="half of a surrogate pair"):
        TRAINED["bpe"].encode("\ud83d")


@pytest.mark.parametrize("content", [b"", b"{", b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(QkvError, match=r"t\.json is no tokenizer file, or not all of one") as caught:
        Tokenizer.load(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_is_missing_cut_off_or_foreign(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    with pytest.raises(QkvError, match=r"t\.json does not exist; a trained tokenizer is expected there"):
        Tokenizer.load(path)
    TRAINED["word"].save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(QkvError, match=r"t\.json is no tokenizer file, or not all of one"):
        Tokenizer.load(path)
    path.write_bytes(whole.replace(b"<mask>", b"[MASK]"))
    with pytest.raises(QkvError, match=r"t\.json: the tokenizer has no token <mask>"):
        Tokenizer.load(path)
