"""SentencePiece: its pieces as a tokenizer of the library, and its files.

A piece begins with ▁ where a space stands before it. Unigrams have log probabilities and the likeliest cut of a text
is taken (Kudo 2018, arXiv:1804.10959); byte pairs have scores, and the neighbours that make the best piece are joined
first. The files are read here rather than by the sentencepiece package, which does not tell how a text is normalised
and would be one more library to trust with a foreign file. Imports no torch.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qkv.errors import QkvError

Piece = tuple[str, float, int]  # how it is spelt, its score and its kind
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # the kinds, as SentencePiece and GGUF number them
_MOST_PIECES = 500_000
_MOST_CUTS = 200_000_000  # characters of pieces that are compared; Gemma's 262,144 pieces take 18 million


def of_pieces(
    pieces: Sequence[Piece], prefix: str, unigram: bool = False, unknown: int | None = None
) -> tokenizers.Tokenizer:
    """A tokenizer of SentencePiece's kind. `prefix` says where a text gets a space before it: "always", also after
    each special token; "first", only where the text begins; or "never".
    """
    # What the user defined is found in the text itself, before its spaces become marks.
    pieces = [
        (text.replace("▁", " "), score, kind) if kind == USER else (text, score, kind) for text, score, kind in pieces
    ]
    kinds = [kind for _, _, kind in pieces]
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else unknown
    library = tokenizers.Tokenizer(_unigram(pieces, unknown) if unigram else _byte_pairs(pieces, unknown))
    before = [normalizers.Prepend("▁")] if prefix == "always" else []
    library.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    if prefix == "first":
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif unigram and BYTE in kinds:  # a text may spell a byte out, which is a piece to the library
        library.pre_tokenizer = pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    after = [decoders.Strip(" ", 1, 0)] if prefix != "never" else []
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after])
    mark(library, ((text, kind) for text, _, kind in pieces))
    return library


def mark(library: tokenizers.Tokenizer, kinds: Iterable[tuple[str, int]]) -> None:
    """Let the library find the pieces of these kinds in a text before anything else."""
    chosen = [(text, kind != USER) for text, kind in kinds if kind in (UNKNOWN, CONTROL, USER)]
    library.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in chosen])


def _byte_pairs(pieces: Sequence[Piece], unknown: int | None) -> models.BPE:
    vocabulary = {text: i for i, (text, _, _) in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        i = next(i for i, (text, _, _) in enumerate(pieces) if vocabulary[text] != i)
        raise QkvError(f"the pieces {i} and {vocabulary[pieces[i][0]]} are both spelt {pieces[i][0]!r}")
    spelt = None if unknown is None else pieces[unknown][0]
    falls_back = any(kind == BYTE for _, _, kind in pieces)
    return models.BPE(vocabulary, _merges(pieces), unk_token=spelt, fuse_unk=True, byte_fallback=falls_back)


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every cut of a piece into two others, the pieces of the best scores first.

    SentencePiece joins the two neighbours that make the piece of the best score; the library goes by a list of pairs.
    A piece can only ever be made by the last step that makes it when it stands alone, for nothing that reaches over
    its ends can have happened before. So of its cuts one counts, the others never apply, and their order is free.
    """
    known = {text: score for text, score, kind in pieces if kind == NORMAL}
    if sum(len(text) ** 2 for text in known) > _MOST_CUTS:
        raise QkvError("its pieces are longer than those of any tokenizer known")
    ranked = sorted(known, key=known.__getitem__, reverse=True)
    cuts = ((text[:n], text[n:]) for text in ranked for n in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def _unigram(pieces: Sequence[Piece], unknown: int | None) -> models.Unigram:
    falls_back = any(kind == BYTE for _, _, kind in pieces)
    return models.Unigram([(text, score) for text, score, _ in pieces], unknown, falls_back)


@dataclass(frozen=True)
class SentencePiece:
    """What a SentencePiece file says: the pieces, whether they are unigrams, and how a text is normalised."""

    pieces: list[Piece]
    unigram: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


def read_model(data: bytes) -> SentencePiece:
    """A SentencePiece model, of whose protocol buffer these few fields count."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            if len(pieces) == _MOST_PIECES:
                raise QkvError(f"it holds more than {_MOST_PIECES:,} pieces, which no known tokenizer does")
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    algorithm = trainer.get(3, 1)
    if not pieces or algorithm not in (1, 2) or trainer.get(24, 0):
        raise QkvError("it holds no pieces of unigrams or byte pairs whose spaces stand before words")
    return SentencePiece(
        pieces, algorithm == 1, normalizer.get(2, b""), normalizer.get(3, 1) == 1, normalizer.get(4, 1) == 1
    )


def reading(
    model: SentencePiece, pieces: list[tuple[str, float, int]], prefix: str, steps: list[normalizers.Normalizer]
) -> tokenizers.Tokenizer:
    """These pieces, for texts that are normalised in these steps and then as the model says."""
    library = of_pieces(pieces, prefix if model.add_dummy_prefix else "never", model.unigram)
    steps = [*steps, normalizers.Precompiled(model.charsmap)] if model.charsmap else [*steps]
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    library.normalizer = normalizers.Sequence([*steps, library.normalizer])
    return library


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer's message: numbers as int, all else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise QkvError("a number in it is too long")

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if key & 7 == 2 else {1: 8, 5: 4}[key & 7]
        if at + length > len(data):
            raise QkvError("it is cut off")
        yield key >> 3, data[at : at + length]
        at += length
