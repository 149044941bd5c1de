"""Tokenizers of published checkpoints in Hugging Face directories.

    tokenizer.json                       as it is
    vocab.txt                            WordPiece, as BERT has it
    vocab.json and merges.txt            byte pairs on bytes, as GPT-2, RoBERTa and Qwen2 have them
    spiece.model, tokenizer.model, …     SentencePiece: T5, ALBERT, XLM-R (whose ids are moved), LLaMA, Gemma
    source.spm, target.spm, vocab.json   SentencePiece for each side, and the ids of its pieces: Marian

Nothing of a checkpoint is run, and nothing is trusted: a file that is too long, not what its name says or at odds with
another raises QkvError. Imports no torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, models, normalizers

from qkv.data.foreign import LONGEST, LONGEST_JSON, ends_of, read_bytes, read_object, read_text, templates_of
from qkv.data.kinds import BERT, ROBERTA, T5, byte_level, frame, plain, word_pieces
from qkv.data.marian import marian
from qkv.data.sentencepiece import CONTROL, UNKNOWN, UNUSED, SentencePiece, read_model, reading
from qkv.data.special import add_tokens, added_to, roles_of
from qkv.data.tokenizer import Tokenizer, library_errors
from qkv.errors import QkvError
from qkv.spec import nearest

# What a tokenizer without tokenizer.json is, by its class; the words Tokenizer and Fast are left off.
_WORDPIECE = {"Bert", "DistilBert", "Electra"}
_BYTES = {"GPT2": "gpt-2", "CodeGen": "gpt-2", "Roberta": "gpt-2", "Bart": "gpt-2", "Qwen2": "qwen2"}
_SENTENCEPIECE = {"T5": "t5", "MT5": "t5", "Albert": "albert", "XLMRoberta": "xlm-r"}
_SENTENCEPIECE |= dict.fromkeys(("Llama", "Gemma"), "llama")
_SENTENCEPIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def load_tokenizer(folder: Path, side: Literal["source", "target"] = "source") -> Tokenizer:
    """The tokenizer of a Hugging Face directory, with its chat templates; QkvError where it has none or a bad one.

    `side` counts where each side has its own: source.spm or target.spm.
    """
    config = {**read_object(folder / "special_tokens_map.json"), **read_object(folder / "tokenizer_config.json")}
    code = config.get("auto_map")
    if isinstance(code, dict) and "AutoTokenizer" in code:
        raise QkvError(
            f"{folder}: its tokenizer is Python code of its own ({str(code['AutoTokenizer'])[:80]}), which is not run"
        )
    with library_errors(f"{folder}: its tokenizer cannot be read"):
        try:
            if any((folder / f"{each}.spm").is_file() for each in ("source", "target")):
                return marian(folder, config, side)
            library = _library(folder, config)
            add_tokens(library, folder, config)
            roles = roles_of(library, config)
            library.add_special_tokens([library.id_to_token(i) for i in roles.values() if i not in added_to(library)])
            told = any(isinstance(config.get(key), bool) for key in ("add_bos_token", "add_eos_token"))
            if told and not (folder / "tokenizer.json").is_file():  # which says itself what stands around a text
                begin = roles.get("begin") if config.get("add_bos_token") else None
                frame(library, *plain(begin, roles.get("end") if config.get("add_eos_token") else None))
            return Tokenizer(library, roles, ends=ends_of(folder), templates=templates_of(folder, config))
        except QkvError as fault:
            raise fault if str(folder) in str(fault) else QkvError(f"{folder}: {fault}") from None


def _library(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    name = config.get("tokenizer_class")
    stem = name.removesuffix("Fast").removesuffix("Tokenizer") if isinstance(name, str) else None
    if (folder / "tokenizer.json").is_file():
        with library_errors(f"{folder / 'tokenizer.json'} is no tokenizer file, or not all of one"):
            return tokenizers.Tokenizer.from_buffer(read_bytes(folder / "tokenizer.json", LONGEST_JSON))
    if (folder / "vocab.txt").is_file():
        _known(stem, _WORDPIECE)
        lines = read_text(folder / "vocab.txt").removesuffix("\n").split("\n")
        return word_pieces({line.removesuffix("\r"): i for i, line in enumerate(lines)}, config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        _known(stem, _BYTES)
        for file in ("vocab.json", "merges.txt"):
            read_bytes(folder / file, LONGEST)
        vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        library = byte_level(vocabulary, merges, _BYTES.get(stem or "GPT2", "gpt-2"), config.get("add_prefix_space"))
        if {"<s>", "</s>", "<mask>"} <= vocabulary.keys():
            library.add_special_tokens([AddedToken("<mask>", lstrip=True)])
            frame(library, *ROBERTA, vocabulary["<s>"], vocabulary["</s>"])
        return library
    for file in _SENTENCEPIECE_FILES:
        if (folder / file).is_file():
            _known(stem, _SENTENCEPIECE)
            with library_errors(f"{folder / file} is no SentencePiece model, or not all of one"):
                return _sentencepiece(read_model(read_bytes(folder / file, LONGEST)), file, stem, config)
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
    library = reading(model, pieces, "first" if config.get("legacy") is False else "always", steps)
    ids = roles_of(library, config)
    if kind in ("albert", "xlm-r") and "mask" in ids:
        library.add_special_tokens([AddedToken(library.id_to_token(ids["mask"]), lstrip=True)])
    if kind == "llama":
        frame(library, *plain(ids.get("begin"), None))
    else:
        frame(library, *{"t5": T5, "albert": BERT, "xlm-r": ROBERTA}[kind], ids.get("begin"), ids.get("end"))
    return library
