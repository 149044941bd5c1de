"""Tokenizers of published checkpoints: Hugging Face directories, the metadata of GGUF files, llama2.c's pieces.

    tokenizer.json                       as it is
    vocab.txt                            WordPiece, as BERT has it
    vocab.json and merges.txt            byte pairs on bytes, as GPT-2, RoBERTa and Qwen2 have them
    spiece.model, tokenizer.model, …     SentencePiece: T5, ALBERT, XLM-R (whose ids are moved), LLaMA, Gemma
    source.spm, target.spm, vocab.json   SentencePiece for each side, and the ids of its pieces: Marian

Nothing of a checkpoint is run, and nothing is trusted: a file that is too long, not what its name says or at odds with
another raises QkvError. Imports no torch.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from qkv.data.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, SentencePiece, mark, of_pieces, read_model
from qkv.data.tokenizer import Encoded, Tokenizer, library_errors
from qkv.errors import QkvError
from qkv.spec import nearest

# What no sound file reaches. The longest known: tokenizer.json of 35 MB, other vocabularies of 5, the rest of 0.4.
_LONGEST_JSON, _LONGEST, _LONGEST_CONFIG = 64_000_000, 16_000_000, 4_000_000

# The keys of tokenizer_config.json for a role, the first that is set counts; then how it is spelt where no key stands.
_KEYS = {
    "pad": ("pad_token",), "unknown": ("unk_token",), "begin": ("bos_token", "cls_token"),
    "end": ("eos_token", "sep_token"), "mask": ("mask_token",),
}  # fmt: skip
_USUAL = {
    "pad": ("<pad>", "[PAD]"), "unknown": ("<unk>", "[UNK]"), "begin": ("<s>", "[CLS]", "<bos>", "<|endoftext|>"),
    "end": ("</s>", "[SEP]", "<eos>", "<|endoftext|>"), "mask": ("<mask>", "[MASK]"),
}  # fmt: skip
# What a tokenizer without tokenizer.json is, by its class; the words Tokenizer and Fast are left off.
_WORDPIECE = {"Bert", "DistilBert", "Electra"}
_BYTES = {"GPT2": "gpt-2", "CodeGen": "gpt-2", "Roberta": "gpt-2", "Bart": "gpt-2", "Qwen2": "qwen2"}
_SENTENCEPIECE = {"T5": "t5", "MT5": "t5", "Albert": "albert", "XLMRoberta": "xlm-r"}
_SENTENCEPIECE |= dict.fromkeys(("Llama", "Gemma"), "llama")
_SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")

# What a prompt looks like, one text and two; the numbers are segments.
_BERT = ("begin $A end", "begin $A end $B:1 end:1")
_ROBERTA = ("begin $A end", "begin $A end end $B end")
_T5 = ("$A end", "$A end $B end")


def load_tokenizer(folder: Path, side: Literal["source", "target"] = "source") -> Tokenizer:
    """The tokenizer of a Hugging Face directory, with its chat templates; QkvError where it has none or a bad one.

    `side` counts where each side has its own, which is where there is a target.spm.
    """
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    code = config.get("auto_map")
    if isinstance(code, dict) and "AutoTokenizer" in code:
        raise QkvError(
            f"{folder}: its tokenizer is Python code of its own ({str(code['AutoTokenizer'])[:80]}), which is not run"
        )
    with library_errors(f"{folder}: its tokenizer cannot be read"):
        try:
            if (folder / "target.spm").is_file():
                return _marian(folder, config, side)
            library = _library(folder, config)
            _add_tokens(library, folder, config)
            roles = _roles(library, config)
            library.add_special_tokens([library.id_to_token(i) for i in roles.values() if i not in _added(library)])
            told = any(isinstance(config.get(key), bool) for key in ("add_bos_token", "add_eos_token"))
            if told and not (folder / "tokenizer.json").is_file():  # which says itself what stands around a text
                begin = roles.get("begin") if config.get("add_bos_token") else None
                _frame(library, *_plain(begin, roles.get("end") if config.get("add_eos_token") else None))
            return Tokenizer(library, roles, ends=_ends(folder), templates=_templates(folder, config))
        except QkvError as fault:
            raise fault if str(folder) in str(fault) else QkvError(f"{folder}: {fault}") from None


# --- a directory --------------------------------------------------------------------------------------------------


def _library(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    name = config.get("tokenizer_class")
    stem = name.removesuffix("Fast").removesuffix("Tokenizer") if isinstance(name, str) else None
    if (folder / "tokenizer.json").is_file():
        with library_errors(f"{folder / 'tokenizer.json'} is no tokenizer file, or not all of one"):
            return tokenizers.Tokenizer.from_buffer(_content(folder / "tokenizer.json", _LONGEST_JSON))
    if (folder / "vocab.txt").is_file():
        _known(stem, _WORDPIECE)
        lines = _text(folder / "vocab.txt").removesuffix("\n").split("\n")
        return _wordpiece({line.removesuffix("\r"): i for i, line in enumerate(lines)}, config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _known(stem, _BYTES)
        for file in ("vocab.json", "merges.txt"):
            _content(folder / file, _LONGEST)
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        library = _byte_level(vocabulary, merges, _BYTES.get(stem or "GPT2", "gpt-2"), config.get("add_prefix_space"))
        if {"<s>", "</s>", "<mask>"} <= vocabulary.keys():
            library.add_special_tokens([AddedToken("<mask>", lstrip=True)])
            _frame(library, *_ROBERTA, vocabulary["<s>"], vocabulary["</s>"])
        return library
    for file in _SENTENCEPIECE_FILES:
        if (folder / file).is_file():
            _known(stem, _SENTENCEPIECE)
            with library_errors(f"{folder / file} is no SentencePiece model, or not all of one"):
                return _sentencepiece(read_model(_content(folder / file, _LONGEST)), file, stem, config)
    raise QkvError(
        f"{folder} has no tokenizer: tokenizer.json, vocab.txt, vocab.json with merges.txt, or one of "
        f"{', '.join(_SENTENCEPIECE_FILES)} is expected"
    )


def _known(stem: str | None, known: Mapping[str, str] | set[str]) -> None:
    if stem is not None and stem not in known:
        raise QkvError(
            f"the tokenizer is a {stem}Tokenizer, which is read from tokenizer.json alone{nearest(stem, known)}; "
            "the transformers package can write that file"
        )


def _content(path: Path, longest: int) -> bytes:
    if path.stat().st_size > longest:
        raise QkvError(f"{path} is {path.stat().st_size:,} bytes long, at most {longest:,} are read")
    return path.read_bytes()


def _text(path: Path, longest: int = _LONGEST) -> str:
    try:
        return _content(path, longest).decode()
    except UnicodeDecodeError:
        raise QkvError(f"{path} is not UTF-8") from None


def _json(path: Path, longest: int = _LONGEST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    text = _text(path, longest)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise QkvError(f"{path} is no JSON ({fault})") from None
    if not isinstance(found, dict):
        raise QkvError(f"{path} holds no JSON object")
    return found


def _ends(folder: Path) -> list[int]:
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int for i in ends):
        raise QkvError(f"generation_config.json says eos_token_id = {str(ends)[:80]}, which are no ids")
    return ends


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; the file of their own counts more than the key."""
    given = config.get("chat_template")
    if isinstance(given, list) and all(isinstance(each, dict) for each in given):
        named = {each.get("name"): each.get("template") for each in given}
    else:
        named = {} if given is None else {"default": given}
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _text(folder / "chat_template.jinja", _LONGEST_CONFIG)
    if not all(isinstance(text, str) for text in [*named, *named.values()]):
        raise QkvError(f"{folder / 'tokenizer_config.json'}: chat_template is neither text nor a list of named texts")
    return {str(name): str(text) for name, text in named.items()}


def _token(value: Any, key: str) -> AddedToken:
    """A token as a configuration spells it: a string, or a table with the string and how it is matched."""
    table = {"content": value} if isinstance(value, str) else value
    if not isinstance(table, dict) or not isinstance(table.get("content"), str):
        raise QkvError(f"tokenizer_config.json: {key} is {str(value)[:80]!r}, a token is expected")
    flags = {name: table.get(name) is True for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(table["content"], special=table.get("special") is not False, **flags)


def _add_tokens(library: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens that stand beside the vocabulary get the ids that the files give them, and what they are matched as."""
    special = [key for keys in _KEYS.values() for key in keys if config.get(key) is not None]
    named = [_token(config[key], key) for key in special]
    more = config.get("additional_special_tokens")
    named += [_token(value, "additional_special_tokens") for value in more] if isinstance(more, list) else []
    known = {token.content for token in named}
    placed = [(i, AddedToken(text, special=text in known)) for text, i in _json(folder / "added_tokens.json").items()]
    table = config.get("added_tokens_decoder")
    for key, value in table.items() if isinstance(table, dict) else ():
        placed.append((int(key) if key.isdecimal() else key, _token(value, f"added_tokens_decoder.{key}")))
    already = set(_added(library).values())
    for i, token in sorted(placed, key=lambda each: str(each[0]).zfill(20)):
        if token.content not in already:
            library.add_tokens([token])
        found = library.token_to_id(token.content)
        if found != i:
            raise QkvError(f"the added token {token.content!r} is said to have the id {i!r}, and it has {found}")
    # One that the vocabulary lacks has no id that a model could know.
    known = {token for token in known if library.token_to_id(token) is not None}
    library.add_special_tokens([token for token in named if token.content in known - set(_added(library).values())])


def _added(library: tokenizers.Tokenizer) -> dict[int, str]:
    return {i: token.content for i, token in library.get_added_tokens_decoder().items()}


def _roles(library: tokenizers.Tokenizer, config: Mapping[str, Any]) -> dict[str, int]:
    roles: dict[str, int] = {}
    for role, keys in _KEYS.items():
        spelt = [_token(config[key], key).content for key in keys if config.get(key) is not None]
        if not any(key in config for key in keys):
            spelt = list(_USUAL[role])
        found = [i for text in spelt if (i := library.token_to_id(text)) is not None]
        if found:
            roles[role] = found[0]
    return roles


# --- the library's tokenizers ---------------------------------------------------------------------------------------


def _frame(
    library: tokenizers.Tokenizer, single: str, pair: str, begin: int | None = None, end: int | None = None
) -> None:
    """Let prompts begin and end as these two patterns say."""
    ids = {name: i for name, i in (("begin", begin), ("end", end)) if i is not None}
    specials = [{"id": name, "ids": [i], "tokens": [library.id_to_token(i)]} for name, i in ids.items()]
    if not all(name in ids for name in ("begin", "end") if name in single):
        raise QkvError("the tokens that begin and end a prompt are not in the vocabulary")
    library.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=specials)


def _plain(begin: int | None, end: int | None) -> tuple[str, str, int | None, int | None]:
    """The frame of decoders: a begin and an end for each text, where there are."""
    single = f"{'begin ' if begin is not None else ''}$A{' end' if end is not None else ''}"
    second = single.replace("begin", "begin:1").replace("$A", "$B:1").replace("end", "end:1")
    return single, f"{single} {second}", begin, end


def _wordpiece(vocabulary: dict[str, int], config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    spelt = {role: _token(config.get(key) or _USUAL[role][1], key).content for role, (*_, key) in _KEYS.items()}
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
    _frame(library, *_BERT, vocabulary.get(spelt["begin"]), vocabulary.get(spelt["end"]))
    return library


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How words are cut before bytes are paired, one cut after the other, by llama.cpp's names.
_CUTS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (),  # the library's own cut
    "smollm": (),  # digits apart, then the same
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
}


def _byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], cuts: str, prefix_space: Any = False
) -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cuts == "llama-bpe"))
    if cuts == "qwen2":
        library.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _CUTS[cuts]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space is True, use_regex=not splits)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if cuts == "smollm" else []
    library.pre_tokenizer = pre_tokenizers.Sequence([*digits, *splits, to_bytes])
    library.decoder = decoders.ByteLevel()
    return library


# --- SentencePiece --------------------------------------------------------------------------------------------------


def _sentencepiece(
    model: SentencePiece, file: str, stem: str | None, config: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    pieces, spelt = model.pieces, {text for text, _, _ in model.pieces}
    kind = "llama" if not model.unigram else "albert" if "[CLS]" in spelt else "xlm-r" if "bpe" in file else "t5"
    kind = _SENTENCEPIECE[stem] if stem else kind
    steps: list[normalizers.Normalizer] = []
    if kind == "t5":
        more = config.get("extra_ids", 100)
        texts = [f"<extra_id_{i}>" for i in reversed(range(more if type(more) is int and 0 <= more < 10_000 else 100))]
        pieces = [*pieces, *((text, 0.0, CONTROL) for text in texts if text not in spelt)]
    elif kind == "xlm-r":  # the order of fairseq, where the weights come from
        first = [("<s>", 0.0, CONTROL), ("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
        pieces = [*first, *pieces[3:], ("<mask>", 0.0, UNUSED)]
    elif kind == "albert":
        steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        steps += [] if config.get("keep_accents") is True else [normalizers.NFKD(), normalizers.StripAccents()]
        steps += [normalizers.Lowercase()] if config.get("do_lower_case") is not False else []
        # A comma after a digit is a piece of its own.
        pieces = [(t, score - 100 if re.search(r"\d,\Z", t) else score, kind) for t, score, kind in pieces]
        pieces = [(t, score, UNUSED if t == "[MASK]" else kind) for t, score, kind in pieces]
    library = _reading(model, pieces, "first" if config.get("legacy") is False else "always", steps)
    ids = _roles(library, config)
    if kind in ("albert", "xlm-r") and "mask" in ids:
        library.add_special_tokens([AddedToken(library.id_to_token(ids["mask"]), lstrip=True)])
    if kind == "llama":
        _frame(library, *_plain(ids.get("begin"), None))
    else:
        _frame(library, *{"t5": _T5, "albert": _BERT, "xlm-r": _ROBERTA}[kind], ids.get("begin"), ids.get("end"))
    return library


def _reading(
    model: SentencePiece, pieces: list[tuple[str, float, int]], prefix: str, steps: list[normalizers.Normalizer]
) -> tokenizers.Tokenizer:
    """These pieces, for texts that are normalised in these steps and then as the model says."""
    library = of_pieces(pieces, prefix if model.add_dummy_prefix else "never", model.unigram)
    steps = [*steps, normalizers.Precompiled(model.charsmap)] if model.charsmap else [*steps]
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    library.normalizer = normalizers.Sequence([*steps, library.normalizer])
    return library


def _marian(folder: Path, config: Mapping[str, Any], side: str) -> Tokenizer:
    """The side's own model cuts a text; vocab.json, most often one for both sides, has the ids of the pieces."""
    own = side == "target" and config.get("separate_vocabs") is True
    table = folder / ("target_vocab.json" if own else "vocab.json")
    ids = _json(table, _LONGEST)
    if set(map(type, ids.values())) != {int} or sorted(ids.values()) != list(range(len(ids))):
        raise QkvError(f"{table} must give the pieces the ids 0, 1, 2, …, each once")
    with library_errors(f"{folder / side}.spm is no SentencePiece model, or not all of one"):
        model = read_model(_content(folder / f"{side}.spm", _LONGEST))
    known = ("pad", "unknown", "end")
    spelt = {role: _token(config.get(_KEYS[role][0]) or _USUAL[role][0], role).content for role in known}
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
    library = _reading(model, [*(placed[text] for text in sorted(ids, key=ids.__getitem__)), *more], "always", [])
    library.add_tokens([AddedToken(text, normalized=False) for text in codes])
    around = decoders.Replace(Regex(r"\A\s+|\s+\z"), "")
    library.decoder = decoders.Sequence([decoders.Replace(" ", ""), library.decoder, around])
    _frame(library, "$A end", "$A $B:1 end:1", end=ids[spelt["end"]])
    return _Side(library, {role: ids[text] for role, text in spelt.items()}, _ends(folder), len(ids), others)


class _Side(Tokenizer):
    """A tokenizer whose model and whose table of `size` ids do not have the same pieces."""

    def __init__(
        self, library: tokenizers.Tokenizer, roles: dict[str, int], ends: list[int], size: int, others: dict[str, int]
    ) -> None:
        super().__init__(library, roles, ends=ends)
        self.size, self._others = size, others

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


# --- GGUF and llama2.c ----------------------------------------------------------------------------------------------

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
            library = _wordpiece(_unmarked(tokens), {})
        elif kind == "gpt2":
            if pre not in _CUTS:
                raise QkvError(f"the GGUF file cuts words as {pre!r} does; {', '.join(_CUTS)} are known")
            merges = [(left, right) for left, right in (merge.split(" ") for merge in _row(metadata, "merges", str))]
            library = _byte_level({text: i for i, text in enumerate(tokens)}, merges, pre)
            mark(library, zip(tokens, kinds, strict=True))
        else:
            raise QkvError(f"the GGUF file's tokenizer is of the kind {kind!r}; gpt2, llama and bert are known")
        return _finished(library, metadata, kind, kind == "llama" or pre == "llama-bpe")


def tokenizer_from_llama2c(pieces: Sequence[bytes], scores: Sequence[float]) -> Tokenizer:
    """The tokenizer of llama2.c's tokenizer.bin: <unk>, <s>, </s>, the 256 bytes, then pieces with real spaces."""
    with library_errors("the tokenizer of llama2.c cannot be made"):
        if len(pieces) < 259 or len(pieces) != len(scores):
            raise QkvError(
                f"{len(pieces)} pieces with {len(scores)} scores are no tokenizer of llama2.c, which has 259 first"
            )
        first = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{i:02X}>", BYTE) for i in range(256))]
        rest = ((piece.decode().replace(" ", "▁"), NORMAL) for piece in pieces[259:])
        spelt = [(text, float(score), kind) for (text, kind), score in zip(chain(first, rest), scores, strict=True)]
        library = of_pieces(spelt, "always")
        _frame(library, *_plain(1, None))
        return Tokenizer(library, {"unknown": 0, "begin": 1, "end": 2})


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


def _unmarked(tokens: list[str]) -> dict[str, int]:
    """BERT's vocabulary from llama.cpp's, which marks where words begin and not where they go on."""
    special = re.compile(r"\[.*\]", re.DOTALL)
    return {
        text if special.fullmatch(text) else text[1:] if text[:1] == "▁" else f"##{text}": i
        for i, text in enumerate(tokens)
    }


def _finished(library: tokenizers.Tokenizer, metadata: Mapping[str, Any], kind: str, begins: bool) -> Tokenizer:
    """The tokenizer with its roles, its ends, its templates and the frame of its prompts."""
    names = _BERT_IDS if kind == "bert" else _IDS
    given = {role: f"{name}_token_id" for role, name in names.items() if f"{_GGUF}{name}_token_id" in metadata}
    roles = _roles(library, {}) if kind == "bert" else {}
    roles |= {role: _id(metadata, key) for role, key in given.items()}
    added = {token.content: i for i, token in library.get_added_tokens_decoder().items() if token.special}
    ends = {added[text] for text in _TURN_ENDS if text in added}
    ends |= {_id(metadata, key) for key in ("eot_token_id", "eom_token_id") if _GGUF + key in metadata}
    if kind == "bert":
        _frame(library, *_BERT, roles.get("begin"), roles.get("end"))
    else:
        begin = roles.get("begin") if _value(metadata, "add_bos_token", bool, begins) else None
        _frame(library, *_plain(begin, roles.get("end") if _value(metadata, "add_eos_token", bool, False) else None))
    key = "tokenizer.chat_template"
    templates = {
        n[len(key) + 1 :] or "default": text for n, text in metadata.items() if n == key or n.startswith(f"{key}.")
    }
    if not all(isinstance(text, str) for text in templates.values()):
        raise QkvError(f"the GGUF key {key} holds no text")
    return Tokenizer(library, roles, ends=ends, templates=templates)
