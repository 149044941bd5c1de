"""A tokenizer.json as the keys `tokenizer.*` of a GGUF file, in llama.cpp's kinds.

gpt2    byte pairs on bytes, words cut as `tokenizer.ggml.pre` says: GPT-2, Llama 3, Qwen, SmolLM
llama   SentencePiece's byte pairs, the earlier a merge the higher a piece's score: LLaMA 2, Mistral, Gemma
bert    WordPiece: ▁ stands before a piece that begins a word, and nothing before one that goes on
"""

import re
from collections.abc import Mapping
from typing import Any

from qkv.errors import QkvError
from qkv.zoo.gguf import (
    BERT_TOKENS,
    BYTE,
    CONTROL,
    CUTS,
    NORMAL,
    SPECIAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)

GGML = "tokenizer.ggml"


def tokenizer_metadata(
    tokenizer: Mapping[str, Any], config: Mapping[str, Any] | None = None, size: int | None = None
) -> dict[str, Any]:
    """The keys `tokenizer.*` of a tokenizer.json.

    `config` is the tokenizer_config.json beside it, which names the special tokens and holds the chat template; ids up
    to the model's `size` that have no token get one that no text holds. Raises QkvError for another kind of tokenizer.
    """
    config, kind, model = config or {}, kind_of(tokenizer), tokenizer["model"]
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    tokens = {i: text for text, i in model["vocab"].items()} | {i: t["content"] for i, t in added.items()}
    size = max(tokens) + 1 if size is None else size
    if max(tokens) >= size:
        raise QkvError(f"the tokenizer has the id {max(tokens)}, and the model only {size} rows for tokens")
    ids = {text: i for i, text in tokens.items()}
    kinds = {i: CONTROL if token["special"] else USER_DEFINED for i, token in added.items()}
    usual = BERT_TOKENS | {"unk": model["unk_token"]} if kind == "bert" else {}
    named = {role: ids.get(spelt(config.get(f"{role}_token") or usual.get(role))) for role in SPECIAL}
    if kind == "bert":
        named |= {"bos": named["cls"], "eos": named["sep"]}  # llama.cpp asks for the first, and other readers for both
    begins, ends = framed(tokenizer.get("post_processor"), named)
    around = {"bos": config.get("add_bos_token", begins) is True, "eos": config.get("add_eos_token", ends) is True}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    how: dict[str, Any] = {f"{GGML}.model": kind}
    if kind == "gpt2":
        how |= {f"{GGML}.pre": CUTS[cuts(tokenizer)], f"{GGML}.merges": merges}
    elif kind == "llama":
        kinds |= {i: BYTE for i, text in tokens.items() if re.fullmatch("<0x[0-9A-F]{2}>", text)}
        kinds |= {i: UNKNOWN for text, i in ids.items() if text == model.get("unk_token")}
        how |= {
            f"{GGML}.scores": scores(merges, ids, size),
            f"{GGML}.add_space_prefix": begins_with_space(tokenizer),
        }
    else:
        check_words(tokenizer, kinds, named, begins and ends)
        kinds |= {i: CONTROL for i in named.values() if i is not None}
        tokens = marked(tokens, kinds)
        how, around = how | normalised(tokenizer["normalizer"]), {"bos": True, "sep": True}
    return {
        **how,
        f"{GGML}.tokens": [tokens.get(i, f"[PAD{i}]") for i in range(size)],
        f"{GGML}.token_type": [kinds.get(i, NORMAL if i in tokens else UNUSED) for i in range(size)],
        **{f"{GGML}.{SPECIAL[role]}_token_id": i for role, i in named.items() if i is not None},
        **{f"{GGML}.add_{role}_token": is_added for role, is_added in around.items()},
        **templates(config.get("chat_template")),
    }


def kind_of(tokenizer: Mapping[str, Any]) -> str:
    """The format's kind of a tokenizer; `QkvError` for one of none."""
    model, cut = tokenizer["model"], cuts(tokenizer)
    if model.get("type") == "BPE" and model.get("byte_fallback") is True:
        return "llama"
    if model.get("type") == "BPE" and cut in CUTS:
        return "gpt2"
    if model.get("type") == "WordPiece" and cut == ("BertPreTokenizer",):
        return "bert"
    known = ", ".join(sorted(set(CUTS.values())))
    raise QkvError(
        f"tokenizer.json is a {model.get('type')} tokenizer that cuts text by {cut}, which is none of GGUF's kinds "
        f"that are written here, {known}, SentencePiece's and BERT's"
    )


def cuts(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """How a pre-tokenizer cuts text, step by step."""
    return tuple(cut(step) for step in steps(tokenizer.get("pre_tokenizer")))


def steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    return list(pre_tokenizer["pretokenizers"]) if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def cut(step: Mapping[str, Any]) -> str:
    """How a step of a pre-tokenizer cuts text: by a pattern, or by its name."""
    if step["type"] == "Split":
        return str(step["pattern"].get("Regex"))
    plain = step["type"] == "ByteLevel" and step.get("use_regex") is False
    return "bytes" if plain else str(step["type"])


def spelt(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def framed(processor: Any, named: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether texts get a begin and an end."""
    for one in processor.get("processors", [processor]) if processor else []:
        if one["type"] == "BertProcessing":
            return one["cls"][1] == named["bos"], one["sep"][1] == named["eos"]
        if one["type"] == "TemplateProcessing":
            special = {name: token["ids"] for name, token in one["special_tokens"].items()}
            pieces = [special.get(piece.get("SpecialToken", {}).get("id")) for piece in one["single"]]
            return pieces[0] == [named["bos"]], pieces[-1] == [named["eos"]]
    return False, False


def templates(given: Any) -> dict[str, Any]:
    """Chat templates: one, or several by name."""
    if isinstance(given, str):
        return {"tokenizer.chat_template": given}
    named = {each["name"]: each["template"] for each in given or []}
    others = [name for name in named if name != "default"]
    keys = {f"tokenizer.chat_template{'' if name == 'default' else f'.{name}'}": text for name, text in named.items()}
    return {**keys, **({"tokenizer.chat_templates": others} if others else {})}


# --- SentencePiece ---


def scores(merges: list[str], ids: Mapping[str, int], size: int) -> list[float]:
    """SentencePiece joins the neighbours whose piece has the highest score: the earlier a merge, the higher."""
    found: dict[int, float] = {}
    for rank, merge in enumerate(merges):
        found.setdefault(ids.get(merge.replace(" ", ""), -1), -float(rank))
    return [found.get(i, -float(len(merges))) for i in range(size)]


def begins_with_space(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    normalizer = tokenizer.get("normalizer") or {}
    parts = [*normalizer.get("normalizers", [normalizer]), *steps(tokenizer.get("pre_tokenizer"))]
    return any(part.get("type") == "Prepend" or part.get("prepend_scheme") in ("always", "first") for part in parts)


# --- WordPiece ---


def check_words(
    tokenizer: Mapping[str, Any], kinds: Mapping[int, int], named: Mapping[str, int | None], framed: bool
) -> None:
    """Refuse a WordPiece tokenizer that the format has no keys for: llama.cpp would cut other tokens, unasked."""
    normalizer = tokenizer.get("normalizer") or {}
    faults = {
        "does not clean a text as BERT does": normalizer.get("type") != "BertNormalizer"
        or not normalizer.get("clean_text", True),
        "does not set Chinese characters apart": not normalizer.get("handle_chinese_chars", True),
        "marks the pieces that go on otherwise than by ##": tokenizer["model"].get("continuing_subword_prefix") != "##",
        "adds words that are no special tokens": USER_DEFINED in kinds.values(),
        "lacks its unknown token": named["unk"] is None,
        "does not set its cls and sep tokens around a text": not framed,
    }
    for fault, found in faults.items():
        if found:
            raise QkvError(f"tokenizer.json is a WordPiece tokenizer that {fault}, for which GGUF has no key")


def normalised(normalizer: Mapping[str, Any]) -> dict[str, bool]:
    """Whether case and accents are kept; both go unless a file says otherwise."""
    lowercase = normalizer.get("lowercase", True)
    accents = normalizer.get("strip_accents")
    plain = lowercase if accents is None else accents
    said = {"lowercase": lowercase, "strip_accents": plain}
    return {} if lowercase and plain else {f"{GGML}.normalizer.{key}": value for key, value in said.items()}


def marked(tokens: Mapping[int, str], kinds: Mapping[int, int]) -> dict[int, str]:
    """BERT's pieces as the format spells them, special tokens as they are."""
    found = {i: text if i in kinds else text[2:] if re.match("##.", text) else f"▁{text}" for i, text in tokens.items()}
    if len(set(found.values())) < len(found):
        raise QkvError("tokenizer.json has pieces that GGUF would spell alike: one that begins with ▁ after its ##")
    return found
