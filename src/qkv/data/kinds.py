"""The kinds of tokenizers that are published, made of the library's parts, and what stands around a prompt."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from qkv.data.special import KEYS, USUAL, token_of
from qkv.errors import QkvError

# What a prompt looks like, one text and two; the numbers are segments.
BERT = ("begin $A end", "begin $A end $B:1 end:1")
ROBERTA = ("begin $A end", "begin $A end end $B end")
T5 = ("$A end", "$A end $B end")


def frame(
    library: tokenizers.Tokenizer, single: str, pair: str, begin: int | None = None, end: int | None = None
) -> None:
    """Let prompts begin and end as these two patterns say."""
    ids = {name: i for name, i in (("begin", begin), ("end", end)) if i is not None}
    specials = [{"id": name, "ids": [i], "tokens": [library.id_to_token(i)]} for name, i in ids.items()]
    if not all(name in ids for name in ("begin", "end") if name in single):
        raise QkvError("the tokens that begin and end a prompt are not in the vocabulary")
    library.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)


def plain(begin: int | None, end: int | None) -> tuple[str, str, int | None, int | None]:
    """The frame of decoders: a begin and an end for each text, where there are."""
    single = f"{'begin ' if begin is not None else ''}$A{' end' if end is not None else ''}"
    second = single.replace("begin", "begin:1").replace("$A", "$B:1").replace("end", "end:1")
    return single, f"{single} {second}", begin, end


def word_pieces(vocabulary: dict[str, int], config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    spelt = {role: token_of(config.get(key) or USUAL[role][1], key).content for role, (*_, key) in KEYS.items()}
    library = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=spelt["unknown"]))
    accents = config.get("strip_accents")
    library.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars") is not False,
        strip_accents=accents if isinstance(accents, bool) else None,
        lowercase=config.get("do_lower_case") is not False,
    )
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    library.add_special_tokens([text for text in spelt.values() if text in vocabulary])
    frame(library, *BERT, vocabulary.get(spelt["begin"]), vocabulary.get(spelt["end"]))
    return library


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How words are cut before bytes are paired, one cut after the other, by llama.cpp's names.
CUTS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (),  # the library's own cut
    "smollm": (),  # digits apart, then the same
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
}


def byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], cuts: str, prefix_space: Any = False
) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cuts == "llama-bpe"))
    if cuts == "qwen2":
        library.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS[cuts]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space is True, use_regex=not splits)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if cuts == "smollm" else []
    library.pre_tokenizer = pre_tokenizers.Sequence([*digits, *splits, to_bytes])
    library.decoder = decoders.ByteLevel()
    return library
