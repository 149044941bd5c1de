"""A tokenizer as models use it: text to ids, prompts to ids, and ids to text, whole or as a stream.

Wherever it came from (`train_tokenizer`, a published checkpoint, GGUF), text is only text: what spells a special token
out becomes one in `parse` alone. Imports no torch.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import tokenizers
from tokenizers import Regex, pre_tokenizers

from qkv.checkpoints.whole import write_text
from qkv.data.kinds import frame, plain
from qkv.errors import QkvError

SPECIALS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")  # ids 0 to 4 of the tokenizers that qkv trains
ROLES = ("pad", "unknown", "begin", "end", "mask")  # what they are for
_NAMES = ("pad_token", "unk_token", "bos_token", "eos_token", "mask_token")  # what chat templates call them


@dataclass(frozen=True)
class Encoded:
    """T ids as a model reads them. `segments` says 0 or 1 for the first and the second text, `offsets` where in its
    text each token stands, in characters, and `specials` which tokens the text does not hold.
    """

    ids: list[int]
    segments: list[int]
    offsets: list[tuple[int, int]]
    specials: list[bool]


class Tokenizer:
    """Text to ids and back. `size` counts every id, gaps too; `ends` are all ids that end a text.

    `pad`, `unknown`, `begin`, `end` and `mask` are ids; one that the tokenizer lacks raises QkvError, and `has` asks.
    BERT's [CLS] and [SEP] are its begin and end. `templates` are chat templates by name, the usual one is "default".
    Without `roles` the library's tokenizer must have the five tokens of those that qkv trains.
    """

    def __init__(
        self,
        library: tokenizers.Tokenizer,
        roles: Mapping[str, int] | None = None,
        *,
        ends: Iterable[int] = (),
        templates: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.trained = roles is None
        """Whether qkv trained it: what stands around a text is then the model's business, not the tokenizer's."""
        self._roles = _own_roles(library) if roles is None else dict(roles)
        self.ends = frozenset([*ends, *(self._roles[role] for role in ("end",) if role in self._roles)])
        self.templates = templates
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # which reads: encode special tokens like any other text
        self._library, self._marked = library, _copy(library)
        self.size: int = 1 + max(library.get_vocab().values(), default=-1)
        if self.size > 2 * library.get_vocab_size() + 1000:
            raise QkvError(
                f"the tokenizer's ids go up to {self.size - 1}, and it has {library.get_vocab_size()} tokens"
            )
        for role, i in [*self._roles.items(), *(("end", i) for i in self.ends)]:
            if not 0 <= i < self.size or library.id_to_token(i) is None:
                raise QkvError(f"the {role} token has the id {i}, which none of the tokenizer's {self.size} tokens has")
        added = library.get_added_tokens_decoder()
        self._added = frozenset(added)
        self._specials = {i: token.content for i, token in added.items() if token.special}
        steps = _steps(library)
        self._of_bytes = "ByteLevel" in steps
        self._marks_spaces = "▁" in steps or "Metaspace" in steps
        bytes_of = {library.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self._bytes = {i: byte for i, byte in bytes_of.items() if i is not None} if "ByteFallback" in steps else {}

    @classmethod
    def load(cls, path: Path) -> Self:
        """The tokenizer of a tokenizer.json that qkv trained; QkvError where it is missing, cut off or another."""
        try:
            with library_errors(f"{path} is no tokenizer file, or not all of one"):
                library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            return cls(library)
        except FileNotFoundError:
            raise QkvError(f"{path} does not exist; a trained tokenizer is expected there") from None
        except QkvError as fault:
            raise fault if str(path) in str(fault) else QkvError(f"{path}: {fault}") from None

    def save(self, path: Path) -> None:
        """Write tokenizer.json, whole or not at all; `path` is that file, whatever its name, or its folder.

        A published one writes two more into a folder: tokenizer_config.json with its special tokens and chat templates,
        and generation_config.json with the ids that end a text.
        """
        file = path if path.suffix == ".json" else path / "tokenizer.json"
        write_text(file, self._library.to_str(pretty=True))
        if file != path and not self.trained:
            says: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.names}
            says["clean_up_tokenization_spaces"] = False
            chats: Any = [{"name": name, "template": text} for name, text in self.templates.items()]
            if chats:
                says["chat_template"] = chats if len(chats) > 1 else chats[0]["template"]
            write_text(path / "tokenizer_config.json", json.dumps(says, indent=2, ensure_ascii=False))
            ids = {
                f"{name}_token_id": self._roles[role]
                for name, role in (("bos", "begin"), ("pad", "pad"))
                if self.has(role)
            }
            write_text(path / "generation_config.json", json.dumps(ids | {"eos_token_id": sorted(self.ends)}, indent=2))

    def framed(self, begin: bool, end: bool) -> "Tokenizer":
        """The same as others publish one, which sets its begin and its end around a text by itself."""
        library = _copy(self._library)
        frame(library, *plain(self.begin if begin else None, self.end if end else None))
        return Tokenizer(library, self._roles, ends=self.ends, templates=self.templates)

    # --- special tokens -------------------------------------------------------------------------------------------

    def has(self, role: str) -> bool:
        """Whether there is a token for pad, unknown, begin, end or mask."""
        return role in self._roles

    @property
    def pad(self) -> int:
        """The id that fills rows up."""
        return self._role("pad")

    @property
    def unknown(self) -> int:
        """The id of what the vocabulary cannot write."""
        return self._role("unknown")

    @property
    def begin(self) -> int:
        """The id that begins a text."""
        return self._role("begin")

    @property
    def end(self) -> int:
        """The id that ends a text."""
        return self._role("end")

    @property
    def mask(self) -> int:
        """The id that hides a token."""
        return self._role("mask")

    @property
    def names(self) -> dict[str, str]:
        """How the special tokens are spelt, by the names of chat templates: bos_token, eos_token, …"""
        named = zip(ROLES, _NAMES, strict=True)
        return {name: str(self._library.id_to_token(self._roles[role])) for role, name in named if role in self._roles}

    def _role(self, role: str) -> int:
        if role not in self._roles:
            raise QkvError(f"the tokenizer has no {role} token, which is needed here; it has {', '.join(self._roles)}")
        return self._roles[role]

    # --- to ids ---------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """The ids of a text and nothing else."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text and nothing else."""
        with _text_errors():
            rows = [each.ids for each in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]
            for n, row in enumerate(rows):
                if self._spells(texts[n], row):
                    rows[n] = self._apart.encode(texts[n], add_special_tokens=False).ids
        return rows

    def prompt(self, text: str, pair: str | None = None) -> Encoded:
        """A text, or two, with the special tokens that the model was trained to find around it; GPT-2's has none."""
        with _text_errors():
            found = self._library.encode(text, pair)
            inside = [i for i, special in zip(found.ids, found.special_tokens_mask, strict=True) if not special]
            if self._spells(text + (pair or ""), inside):
                found = self._apart.encode(text, pair)
        return Encoded(
            found.ids, found.type_ids, found.offsets, [special == 1 for special in found.special_tokens_mask]
        )

    def parse(self, text: str) -> list[int]:
        """The ids of a text that spells its special tokens out, such as a rendered chat; nothing is added."""
        with _text_errors():
            return self._marked.encode(text, add_special_tokens=False).ids

    def _spells(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the model took part of a text for a special token; an unknown token may be the text's own fault."""
        if self._specials.keys().isdisjoint(ids):
            return False
        unknown = self._roles.get("unknown")
        return any(i != unknown or self._specials[i] in text for i in self._specials.keys() & ids)

    @cached_property
    def _apart(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for texts that spell special tokens: it cuts each after its first character."""
        cuts = {f"{re.escape(spelt[0])}(?={re.escape(spelt[1:])})" for spelt in self._specials.values() if spelt[1:]}
        cut = pre_tokenizers.Split(Regex("|".join(sorted(cuts))), "isolated")
        made, before = _copy(self._library), self._library.pre_tokenizer
        made.pre_tokenizer = cut if before is None else pre_tokenizers.Sequence([before, cut])
        made.encode_special_tokens = True
        return made

    # --- to text --------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens dropped; bytes that make no character become �."""
        if self._bytes.keys().isdisjoint(ids):
            return self._library.decode(list(ids), skip_special_tokens=True)
        return self._library.decoder.decode(list(self._sound(ids)))

    def _sound(self, ids: Sequence[int]) -> Iterator[str]:
        """Pieces in which byte pieces make whole characters: the library spoils all neighbours of a broken one."""
        waiting = bytearray()
        for i in [*(i for i in ids if i not in self._specials), -1]:
            if i in self._bytes:
                waiting.append(self._bytes[i])
                continue
            for character in waiting.decode("utf-8", "replace"):
                yield from [character] if character == "�" else [f"<0x{byte:02X}>" for byte in character.encode()]
            waiting.clear()
            piece = self._library.id_to_token(i) if i >= 0 else None
            if piece is not None:
                yield piece

    def stream(self) -> "TextStream":
        """A decoder that takes one id at a time."""
        return TextStream(self)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One readable piece per id, for tables and the axes of pictures.

        A character of several ids stands at the last of them, the others show …; a piece of blanks shows ␣ ↵ ⇥.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown = []
        for i in ids:
            piece = self._library.id_to_token(i) or f"<{i}>"
            raw = self._raw(i, piece)
            if raw is None:
                decoder.reset()
                shown.append(piece.replace("▁", " ") if self._marks_spaces else piece)
            else:
                shown.append(decoder.decode(raw) or "…")
        return [piece.translate(_BLANKS) if piece.isspace() else piece for piece in shown]

    def _raw(self, i: int, piece: str) -> bytes | None:
        """The bytes that a piece writes, if it writes bytes."""
        if i in self._bytes:
            return bytes([self._bytes[i]])
        if not self._of_bytes or i in self._added or not _BYTE_OF.keys() >= set(piece):
            return None
        return bytes(_BYTE_OF[character] for character in piece)


class TextStream:
    """Text as its ids arrive: what `push` and `close` give makes, joined, exactly `decode` of all ids.

    A character whose bytes are not all there waits. Only the last ids are looked at, so each costs the same.
    """

    _CONTEXT = 8  # ids before the new one that are decoded with it; a character has at most four bytes

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of the text of `_ids`

    def push(self, i: int) -> str:
        """The text that one more id completes, often a word, sometimes nothing."""
        if i in self._tokenizer._specials:
            return ""
        self._ids.append(i)
        text = self._tokenizer.decode(self._ids)
        whole = _whole(text)
        new, self._given = text[self._given : whole], max(self._given, whole)
        if len(self._ids) >= 3 * self._CONTEXT:
            del self._ids[: -self._CONTEXT]
            self._given = _whole(self._tokenizer.decode(self._ids))
        return new

    def close(self) -> str:
        """What is left: � where the last character is not all there. The stream may then be used anew."""
        left = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._given = [], 0
        return left


def _whole(text: str) -> int:
    """How many characters of a text later ids cannot change."""
    return len(text) - text.endswith("�")


# --- the library --------------------------------------------------------------------------------------------------


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Faults of the library, its panics too, as one sentence."""
    try:
        yield
    except (FileNotFoundError, QkvError):
        raise
    except BaseException as fault:  # the library has no narrower class, and its panic is no Exception
        if not isinstance(fault, Exception) and type(fault).__name__ != "PanicException":
            raise
        raise QkvError(f"{what} ({' '.join(str(fault).split())[:200]})") from None


@contextmanager
def _text_errors() -> Iterator[None]:
    try:
        with library_errors("the tokenizer failed on a text"):
            yield
    except QkvError as fault:
        if isinstance(fault.__context__, TypeError | UnicodeError):
            raise QkvError("a text is not valid Unicode: it holds half of a surrogate pair") from None
        raise


def _own_roles(library: tokenizers.Tokenizer) -> dict[str, int]:
    ids = [library.token_to_id(special) for special in SPECIALS]
    if None in ids:
        missing = SPECIALS[ids.index(None)]
        raise QkvError(f"the tokenizer has no token {missing}; a tokenizer that qkv trained is expected")
    return {role: i for role, i in zip(ROLES, ids, strict=True) if i is not None}


def _copy(library: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer with the same parts; they share the vocabulary, so this takes no time."""
    made, parts = tokenizers.Tokenizer(library.model), ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    for part in parts:
        if getattr(library, part) is not None:
            setattr(made, part, getattr(library, part))
    added = library.get_added_tokens_decoder()
    made.add_tokens([added[i] for i in sorted(added)])
    if made.get_added_tokens_decoder() != added:
        raise QkvError("the tokenizer's added tokens do not have the ids that follow its vocabulary")
    return made


def _steps(library: tokenizers.Tokenizer) -> set[str]:
    """The kinds of the decoder's steps, and what they replace."""
    found: set[str] = set()

    def visit(step: Any) -> None:
        if isinstance(step, dict):
            found.update(str(step[key]) for key in ("type", "String") if key in step)
        for inner in step.values() if isinstance(step, dict) else step if isinstance(step, list) else ():
            visit(inner)

    if library.decoder is not None:
        visit(json.loads(library.decoder.__getstate__()))
    return found


_BLANKS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})


def _bytes() -> dict[str, int]:
    """The character by which byte-level pieces write each byte: itself if it can be seen, else one from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(unseen)}


_BYTE_OF = _bytes()
