"""Tokenisers: how text becomes tokens is a spec, and training it on text makes a `Tokenizer`.

kind       tokens                                   what decode(encode(text)) changes
bpe        byte pairs merged inside words           nothing, for any text
character  Unicode characters, spaces too           drops characters that training did not show
symbols    whatever stands between spaces           runs of whitespace become one space; drops unknown symbols
word       words and punctuation marks              spaces are set anew; drops unknown words
wordpiece  beginnings and continuations of words    spaces are set anew; drops words with a character unknown there
unigram    the likeliest pieces of words            runs of whitespace and ▁ become one space; drops unknown characters

`lowercase` lowers the text first. Nothing else is normalised. Chinese, Japanese kana and punctuation need no spaces:
for `word` and `wordpiece` each such character is a word, and decoding sets no space beside it.

Training gives the same tokenizer for the same text. The library does not (its hash maps have a random order, which
reaches the WordPiece and unigram vocabularies), so those two are put in order below.

The library runs batches on all cores, unless TOKENIZERS_PARALLELISM or RAYON_NUM_THREADS in the environment says
otherwise, and goes on working in a process that was forked; so there is nothing to set here.
"""

import json
from collections.abc import Iterable, Iterator
from typing import ClassVar

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from qkv.data.tokenizer import SPECIALS, Tokenizer
from qkv.errors import QkvError
from qkv.spec import Spec, part

_EAST = r"\p{Han}\p{Hiragana}\p{Katakana}"
_LETTERS = rf"[[\p{{L}}\p{{M}}\p{{N}}]&&[^{_EAST}]]+"
# Letters and digits, held together by an apostrophe or a hyphen (don't, well-known) and inside numbers by . , : too.
_WORD = Regex(rf"[{_EAST}]|{_LETTERS}(?:(?:['’_-]|(?<=\p{{N}})[.,:](?=\p{{N}})){_LETTERS})*|\S")
# A space that no writer sets: before a closing mark, after an opening one, and between East Asian characters.
_WIDE = rf"[{_EAST}\u3000-\u303f\uff00-\uff60]"
_NO_SPACE = Regex(rf" (?=[.,;:!?%)\]}}»”…])|(?<=[(\[{{«“¿¡]) | (?={_WIDE})(?<={_WIDE} )")
# A text may spell a special token out; cut after its first character, no token of the vocabulary is it.
_SPELT = pre_tokenizers.Split(Regex(r"<(?=(?:pad|unk|s|/s|mask)>)"), "isolated")
_START = "\ue000"  # marks the start of a word while WordPiece trains; a character for private use


class TokenizerSpec(Spec):
    """How text becomes at most `size` kinds of tokens, special ones included.

    A further kind says in `train` how to make the library's tokenizer from texts.
    """

    size: int | None
    least: ClassVar[int] = len(SPECIALS) + 1  # the smallest size that can work

    def check(self) -> None:
        if self.size is not None and self.size < self.least:
            raise QkvError(f"a size of {self.size} is too small; at least {self.least} is needed")

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        """A trained tokenizer whose first ids are `SPECIALS`."""
        raise NotImplementedError


@part("word")
class Word(TokenizerSpec):
    """Words and punctuation marks: the `size` most frequent that occur at least `min_frequency` times."""

    size: int | None = None
    min_frequency: int = 1
    lowercase: bool = False

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = _untrained(models.WordLevel(unk_token="<unk>"), self.lowercase)
        made.pre_tokenizer = pre_tokenizers.Split(_WORD, "removed", invert=True)
        made.decoder = _spaced()
        return _count(made, texts, self.size, self.min_frequency)


@part("symbols")
class Symbols(TokenizerSpec):
    """Symbols with spaces between them, such as phones ("K AE T") or words that another program has split."""

    size: int | None = None
    min_frequency: int = 1
    lowercase: bool = False

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = _untrained(models.WordLevel(unk_token="<unk>"), self.lowercase)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), _SPELT])
        return _count(made, texts, self.size, self.min_frequency)


@part("character")
class Character(TokenizerSpec):
    """Unicode characters, spaces and line ends among them."""

    size: int | None = None
    min_frequency: int = 1
    lowercase: bool = False

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = _untrained(models.WordLevel(unk_token="<unk>"), self.lowercase)
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return _count(made, texts, self.size, self.min_frequency)


@part("bpe")
class BPE(TokenizerSpec):
    """Byte pair encoding: pairs of tokens that stand together at least twice are merged, the most frequent first.

    It begins from all 256 bytes, so no text is unknown, and merges nothing across words, split as GPT-2 splits them.
    Sennrich et al. 2016 (arXiv:1508.07909); on bytes Radford et al. 2019.
    """

    size: int
    lowercase: bool = False
    least: ClassVar[int] = len(SPECIALS) + 256

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        made = _untrained(models.BPE(), self.lowercase)
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.size,
            min_frequency=2,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        made.train_from_iterator(texts, trainer)
        return made


@part("wordpiece")
class WordPiece(TokenizerSpec):
    """Words cut, longest piece first, into a beginning and continuations, which are written ##like this.

    The pieces are those of byte pair encoding with the start of a word as one more character.
    Schuster and Nakajima 2012; as BERT has it, Devlin et al. 2019 (arXiv:1810.04805).
    """

    size: int
    lowercase: bool = False

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        words = pre_tokenizers.Split(_WORD, "removed", invert=True)
        starts, others = set[str](), set[str]()

        def watched() -> Iterator[str]:
            for text in texts:
                text = normalizers.Lowercase().normalize_str(text) if self.lowercase else text
                for word, _ in words.pre_tokenize_str(text):
                    starts.add(word[0])
                    others.update(word[1:])
                yield text
            _must_fit(len(starts) + len(others), self.size)

        merged = self._merged(words, watched())
        single = [*SPECIALS, *sorted(starts), *("##" + character for character in sorted(others))]
        vocabulary = list(dict.fromkeys([*single, *merged]))[: self.size]
        ids = {piece: i for i, piece in enumerate(vocabulary)}
        made = _untrained(models.WordPiece(ids, unk_token="<unk>", max_input_chars_per_word=100), self.lowercase)
        made.pre_tokenizer, made.decoder = words, _spaced()
        made.add_special_tokens(list(SPECIALS))
        return made

    def _merged(self, words: pre_tokenizers.PreTokenizer, texts: Iterator[str]) -> list[str]:
        """Beginnings and continuations in the order in which byte pair encoding found them."""
        learner = _untrained(models.BPE(), lowercase=False)
        mark = pre_tokenizers.Metaspace(_START, prepend_scheme="always", split=False)
        learner.pre_tokenizer = pre_tokenizers.Sequence([words, mark])
        # Room for twice the pieces: a merge that only joins the mark to a character makes no new piece.
        trainer = trainers.BpeTrainer(vocab_size=2 * self.size, min_frequency=2, show_progress=False)
        learner.train_from_iterator(texts, trainer)
        ids = learner.get_vocab()
        pieces = [piece for piece in sorted(ids, key=ids.__getitem__) if len(piece) > 1]
        return [piece[1:] if piece[0] == _START else "##" + piece for piece in pieces]


@part("unigram")
class Unigram(TokenizerSpec):
    """Words cut into the pieces whose probabilities have the largest product; pieces are found by EM and pruning.

    Kudo 2018 (arXiv:1804.10959).
    """

    size: int
    lowercase: bool = False

    def train(self, texts: Iterator[str]) -> tokenizers.Tokenizer:
        space = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        made = tokenizers.Tokenizer(models.Unigram())
        normalizer = normalizers.Sequence([*space, normalizers.Lowercase()] if self.lowercase else space)
        made.normalizer = normalizer
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), _SPELT])
        made.decoder = decoders.Metaspace()
        characters = {"▁"}

        def watched() -> Iterator[str]:  # must not touch `made`, which is locked while it trains
            for text in texts:
                characters.update(*normalizer.normalize_str(text).split(" "))
                yield text
            _must_fit(len(characters), self.size)

        trainer = trainers.UnigramTrainer(
            vocab_size=self.size, special_tokens=list(SPECIALS), unk_token="<unk>", show_progress=False
        )
        made.train_from_iterator(watched(), trainer)
        made.model = _in_order(made)
        return made


def _in_order(made: tokenizers.Tokenizer) -> models.Unigram:
    """A unigram model without the two traces of chance: rounding in its scores, and characters that were put back.

    Sums in another order differ by 4e-11 (measured); three decimals hide that. The characters that pruning took away
    come back in a random order, each 1e-4 above the one before, the first with the lowest score of all: all get that.
    """
    pieces: list[tuple[str, float]] = json.loads(made.to_str())["model"]["vocab"][len(SPECIALS) :]
    lowest = min(score for _, score in pieces)

    def steady(piece: str, score: float) -> float:
        steps = (score - lowest) / 1e-4
        back = len(piece) == 1 and steps < len(pieces) and abs(steps - round(steps)) < 1e-5
        return round(lowest if back else score, 3)

    scored = sorted((-steady(piece, score), piece) for piece, score in pieces)
    return models.Unigram([(special, 0.0) for special in SPECIALS] + [(piece, -cost) for cost, piece in scored], 1)


# --- what the kinds share -----------------------------------------------------------------------------------------


def _untrained(model: models.Model, lowercase: bool) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    if lowercase:
        made.normalizer = normalizers.Lowercase()
    return made


def _spaced() -> decoders.Decoder:
    """Pieces joined, words set apart by spaces except where no writer sets one."""
    words = decoders.WordPiece(prefix="##", cleanup=False)
    return decoders.Sequence([words, decoders.Fuse(), decoders.Replace(_NO_SPACE, "")])


def _count(
    made: tokenizers.Tokenizer, texts: Iterator[str], size: int | None, min_frequency: int
) -> tokenizers.Tokenizer:
    """Whole tokens by frequency, then by the alphabet."""
    trainer = trainers.WordLevelTrainer(
        vocab_size=size or 2**31, min_frequency=min_frequency, special_tokens=list(SPECIALS), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def _must_fit(characters: int, size: int) -> None:
    least = len(SPECIALS) + characters
    if least > size:
        raise QkvError(
            f"the tokenizer's size of {size} is too small for this text: its characters alone take {least}; "
            'raise the size, or take kind = "bpe", which starts from bytes'
        )


# --- trained ------------------------------------------------------------------------------------------------------


def train_tokenizer(spec: TokenizerSpec, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that a spec describes, made from texts that are read once; QkvError where they hold no token."""
    seen = False

    def noted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text
        if not seen:
            raise QkvError("there is no text to train a tokenizer on: every example is empty")

    made = spec.train(noted())
    if made.get_vocab_size() <= len(SPECIALS):
        raise QkvError(f"no token of the text is frequent enough for {spec!r}; lower min_frequency")
    return Tokenizer(made)
