"""Tokenizers in the metadata of GGUF files. Imports no torch."""

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from qkv.data.kinds import BERT, CUTS, byte_level, frame, plain, word_pieces
from qkv.data.sentencepiece import CONTROL, mark, of_pieces
from qkv.data.special import roles_of
from qkv.data.tokenizer import Tokenizer, library_errors
from qkv.errors import QkvError

_GGUF = "tokenizer.ggml."
_PRE = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "phi-2": "gpt-2"}  # other names
_IDS = {"begin": "bos", "end": "eos", "unknown": "unknown", "pad": "padding", "mask": "mask"}
_BERT_IDS = {**_IDS, "begin": "cls", "end": "seperator"}  # so spelt in the format
# Control tokens that end a turn or a text, in files that do not say so.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes; QkvError where a key is missing, wrong or of another kind.

    Kinds: gpt2 (byte pairs on bytes; tokenizer.ggml.pre says how words are cut), llama (SentencePiece) and bert.
    """
    with library_errors("the GGUF file's tokenizer cannot be made"):
        kind, pre = _value(metadata, "model", str), _value(metadata, "pre", str, "default")
        pre = _PRE.get(pre, pre)
        tokens = _row(metadata, "tokens", str)
        kinds = _row(metadata, "token_type", int, len(tokens))
        if kind == "llama":
            library = _gguf_sentencepiece(metadata, tokens, kinds)
        elif kind == "bert":
            library = word_pieces(_unmarked(tokens, kinds), _as_configured(metadata, tokens))
        elif kind == "gpt2":
            if pre not in CUTS:
                raise QkvError(f"the GGUF file cuts words as {pre!r} does; {', '.join(CUTS)} are known")
            merges = [(left, right) for left, right in (merge.split(" ") for merge in _row(metadata, "merges", str))]
            library = byte_level({text: i for i, text in enumerate(tokens)}, merges, pre)
            mark(library, zip(tokens, kinds, strict=True))
        else:
            raise QkvError(f"the GGUF file's tokenizer is of the kind {kind!r}; gpt2, llama and bert are known")
        return _finished(library, metadata, kind, kind == "llama" or pre == "llama-bpe")


def _value(metadata: Mapping[str, Any], name: str, kind: type, usual: Any = None) -> Any:
    found = metadata.get(_GGUF + name, usual)
    if type(found) is not kind and (found is None or _GGUF + name in metadata):
        raise QkvError(f"the GGUF key {_GGUF}{name} is {str(found)[:80]!r}; {kind.__name__} is expected")
    return found


def _id(metadata: Mapping[str, Any], name: str) -> int:
    found: int = _value(metadata, name, int)
    if not 0 <= found < 2**31:
        raise QkvError(f"the GGUF key {_GGUF}{name} is {found}, which is no id")
    return found


def _row(metadata: Mapping[str, Any], name: str, kind: type, length: int | None = None) -> list[Any]:
    found = metadata.get(_GGUF + name)
    if not isinstance(found, list) or set(map(type, found)) != {kind} or length not in (None, len(found)):
        many = "a list" if length is None else f"{length} values, one for each token,"
        raise QkvError(f"the GGUF key {_GGUF}{name} must hold {many} of the type {kind.__name__}")
    return found


def _gguf_sentencepiece(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    scores = _row(metadata, "scores", float, len(tokens))
    prefix = "always" if _value(metadata, "add_space_prefix", bool, True) else "never"
    unknown = _id(metadata, "unknown_token_id") if f"{_GGUF}unknown_token_id" in metadata else len(tokens)
    pieces = list(zip(tokens, scores, kinds, strict=True))
    return of_pieces(pieces, prefix, unknown=unknown if unknown < len(tokens) else None)


def _unmarked(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """BERT's vocabulary from llama.cpp's, which marks where words begin and not where they go on."""
    special = re.compile(r"\[.*\]", re.DOTALL)
    return {
        text if kind == CONTROL or special.fullmatch(text) else text[1:] if text[:1] == "▁" else f"##{text}": i
        for i, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
    }


def _as_configured(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What a tokenizer_config.json would say of BERT's text and of what stands for unknown words."""
    lowercase = _value(metadata, "normalizer.lowercase", bool, True)
    accents = _value(metadata, "normalizer.strip_accents", bool, lowercase)
    unknown = _id(metadata, "unknown_token_id") if f"{_GGUF}unknown_token_id" in metadata else len(tokens)
    spelt = {"unk_token": tokens[unknown]} if unknown < len(tokens) else {}
    return {"do_lower_case": lowercase, "strip_accents": accents, **spelt}


def _finished(library: tokenizers.Tokenizer, metadata: Mapping[str, Any], kind: str, begins: bool) -> Tokenizer:
    """The tokenizer with its roles, its ends, its templates and the frame of its prompts."""
    names = _BERT_IDS if kind == "bert" else _IDS
    given = {role: f"{name}_token_id" for role, name in names.items() if f"{_GGUF}{name}_token_id" in metadata}
    roles = roles_of(library, {}) if kind == "bert" else {}
    roles |= {role: _id(metadata, key) for role, key in given.items()}
    added = {token.content: i for i, token in library.get_added_tokens_decoder().items() if token.special}
    ends = {added[text] for text in _TURN_ENDS if text in added}
    ends |= {_id(metadata, key) for key in ("eot_token_id", "eom_token_id") if _GGUF + key in metadata}
    if kind == "bert":
        frame(library, *BERT, roles.get("begin"), roles.get("end"))
    else:
        begin = roles.get("begin") if _value(metadata, "add_bos_token", bool, begins) else None
        frame(library, *plain(begin, roles.get("end") if _value(metadata, "add_eos_token", bool, False) else None))
    key = "tokenizer.chat_template"
    templates = {
        n[len(key) + 1 :] or "default": text for n, text in metadata.items() if n == key or n.startswith(f"{key}.")
    }
    if not all(isinstance(text, str) for text in templates.values()):
        raise QkvError(f"the GGUF key {key} holds no text")
    return Tokenizer(library, roles, ends=ends, templates=templates)
