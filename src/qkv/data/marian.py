"""Marian's tokenizers, one for each side: SentencePiece cuts a text, and a table has the ids of its pieces."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders

from qkv.checkpoints.whole import write_bytes
from qkv.data.foreign import LONGEST, ends_of, read_bytes, read_object
from qkv.data.kinds import frame
from qkv.data.sentencepiece import CONTROL, UNKNOWN, UNUSED, read_model, reading
from qkv.data.special import KEYS, USUAL, token_of
from qkv.data.tokenizer import Encoded, Tokenizer, library_errors
from qkv.errors import QkvError

SAYS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""The files that say of a tokenizer what neither its model nor its table does."""


def marian(folder: Path, config: Mapping[str, Any], side: str) -> Tokenizer:
    """The side's own model cuts a text; vocab.json, most often one for both sides, has the ids of the pieces."""
    if not (folder / f"{side}.spm").is_file():
        raise QkvError(f"{folder} has the tokenizer of the other side alone: {side}.spm is expected")
    own = side == "target" and config.get("separate_vocabs") is True
    table = folder / ("target_vocab.json" if own else "vocab.json")
    ids = read_object(table, LONGEST)
    if set(map(type, ids.values())) != {int} or sorted(ids.values()) != list(range(len(ids))):
        raise QkvError(f"{table} must give the pieces the ids 0, 1, 2, …, each once")
    with library_errors(f"{folder / side}.spm is no SentencePiece model, or not all of one"):
        model = read_model(read_bytes(folder / f"{side}.spm", LONGEST))
    known = ("pad", "unknown", "end")
    spelt = {role: token_of(config.get(KEYS[role][0]) or USUAL[role][0], role).content for role in known}
    if not ids.keys() >= set(spelt.values()):
        raise QkvError(f"{table} lacks one of the tokens {', '.join(spelt.values())}")
    placed = {piece[0]: piece for piece in model.pieces if piece[2] not in (UNKNOWN, CONTROL, UNUSED)}
    more = [piece for text, piece in placed.items() if text not in ids]
    codes = [text for text in ids if side == "source" and re.fullmatch(">>.+<<", text)]  # languages to translate into
    placed |= {text: (text, 0.0, UNUSED) for text in codes}
    placed |= {text: (text, 0.0, UNKNOWN if role == "unknown" else CONTROL) for role, text in spelt.items()}
    others = {text: i for text, i in ids.items() if text not in placed}
    # No text has a space left when it is cut, so no cut finds the pieces that this side's model lacks.
    placed |= {text: (f" {text}", 0.0, UNUSED) for text in others}
    library = reading(model, [*(placed[text] for text in sorted(ids, key=ids.__getitem__)), *more], "always", [])
    library.add_tokens([AddedToken(text, normalized=False) for text in codes])
    around = decoders.Replace(Regex(r"\A\s+|\s+\z"), "")
    library.decoder = decoders.Sequence([decoders.Replace(" ", ""), library.decoder, around])
    frame(library, "$A end", "$A $B:1 end:1", end=ids[spelt["end"]])
    files = [folder / name for name in (f"{side}.spm", table.name, *SAYS)]
    return Side(
        library,
        {role: ids[text] for role, text in spelt.items()},
        ends_of(folder),
        len(ids),
        others,
        {file.name: read_bytes(file, LONGEST) for file in files if file.is_file()},
    )


class Side(Tokenizer):
    """A tokenizer whose model and whose table of `size` ids do not have the same pieces. `files` say what it is."""

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        roles: dict[str, int],
        ends: list[int],
        size: int,
        others: dict[str, int],
        files: dict[str, bytes],
    ) -> None:
        super().__init__(library, roles, ends=ends)
        self.size, self._others, self._files = size, others, files

    def save(self, path: Path) -> None:
        """Write the files that it was read from into a folder, where those of the other side may stand already.

        A tokenizer.json has no place for the table: `QkvError` for a path that names one.
        """
        if path.suffix == ".json":
            raise QkvError(f"{path} cannot hold a tokenizer whose ids stand in a table of their own: name a folder")
        for name, content in self._files.items():
            write_bytes(path / name, content)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.prompt(text).ids[:-1] for text in texts]  # all but the end

    def prompt(self, text: str, pair: str | None = None) -> Encoded:
        found, texts = super().prompt(text, pair), (text, pair or "")
        spans = zip(found.ids, found.segments, found.offsets, strict=True)
        return replace(found, ids=[self._known(i, texts[side][slice(*span)]) for i, side, span in spans])

    def parse(self, text: str) -> list[int]:
        return [self._known(i) for i in super().parse(text)]

    def _known(self, i: int, text: str = "") -> int:
        """The id, or what the table says of a piece: letters that this side's model lacks may be the other side's."""
        if i == self.unknown:
            return self._others.get(self._library.normalizer.normalize_str(text).removeprefix("▁"), i)
        return i if i < self.size else self.unknown
