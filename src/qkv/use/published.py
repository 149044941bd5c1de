"""A published checkpoint, ready to use."""

from pathlib import Path
from typing import Any

import torch

from qkv.checkpoints.directory import read_table
from qkv.checkpoints.gguf_model import GGUFModel, Llama2CModel
from qkv.checkpoints.llama2c import read_tokenizer
from qkv.checkpoints.load import Source, load_published
from qkv.checkpoints.opening import opened
from qkv.data import Tokenizer, Tokenizers, load_tokenizer, tokenizer_from_gguf, tokenizer_from_llama2c
from qkv.decode import Beam, Greedy, Sample, Search
from qkv.errors import QkvError
from qkv.spec import load
from qkv.use.task import Manner, Task


def open_published(path: Path, dtype: torch.dtype | None = None) -> Task:
    """The model of a directory or file that others published, its tokenizer, and how it wants to be used."""
    source = opened(path, dtype)
    tokenizer, wanted = tokenizer_of(source), manner(source)
    own = (source.path / "target.spm").is_file()
    target = load_tokenizer(source.path, "target") if own else tokenizer
    task = Task(load_published(source, dtype), Tokenizers(tokenizer, target), wanted)
    rows = len(task.model.wiring.embed.table)
    if task.pairs and not all(0 <= i < rows for i in wanted.begin):
        raise QkvError(f"{path} says that an answer begins with the tokens {wanted.begin}; the model has {rows}")
    return task


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer in a checkpoint, or beside it."""
    if isinstance(source, GGUFModel):
        if source.file.metadata.get("tokenizer.ggml.model", "none") == "none":
            raise QkvError(f"{source.path} holds weights without a tokenizer: convert a checkpoint that has one")
        return tokenizer_from_gguf(source.file.metadata)
    if isinstance(source, Llama2CModel):
        pieces = read_tokenizer(beside(source.path), source.config["vocab_size"])
        return tokenizer_from_llama2c(pieces.pieces, pieces.scores)
    return load_tokenizer(source.path)


def beside(path: Path) -> Path:
    """llama2.c's tokenizer beside its weights: tokenizer.bin, or the only file whose name begins so."""
    found = sorted(path.parent.glob("tok*.bin"))
    if len(found) != 1:
        raise QkvError(f"beside {path} one tokenizer is expected, tokenizer.bin; there are {len(found)}")
    return found[0]


def manner(source: Source) -> Manner:
    """What a checkpoint's configuration says of its use."""
    where = source.path / "generation_config.json"
    says = {**source.config, **table(where)}
    start = says.get("decoder_start_token_id")
    starts = [says.get("bos_token_id") if start is None else start, says.get("forced_bos_token_id")]
    longest = table(source.path / "sentence_bert_config.json").get("max_seq_length")
    return Manner(
        search=search(says, str(where)),
        begin=tuple(i for i in starts if isinstance(i, int)),
        unheeded=tuple(unheeded(says)),
        longest=longest if isinstance(longest, int) and longest > 0 else None,
    )


def search(says: dict[str, Any], where: str = "generation_config.json") -> Search:
    """The search that a generation_config.json asks for."""
    beams, penalty = says.get("num_beams"), says.get("length_penalty")
    if isinstance(beams, int) and beams > 1:
        return Beam(size=beams, length_penalty=float(penalty) if isinstance(penalty, int | float) else 1.0)
    if says.get("do_sample") is not True:
        return Greedy()
    asked = {key: says.get(key) for key in ("temperature", "top_k", "top_p", "min_p")}
    made: Sample = load({"kind": "sample", **{key: value for key, value in asked.items() if value}}, Sample, where)
    return made


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1, 1.0), "no_repeat_ngram_size": (0,), "min_length": (0,), "bad_words_ids": ([],),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "typical_p": (1, 1.0), "num_beam_groups": (1,),
}  # fmt: skip
"""Settings of generation for which there is no part, and the values at which they do nothing."""


def unheeded(says: dict[str, Any]) -> list[str]:
    """The settings of a checkpoint's generation that are not followed."""
    return [f"{key} = {says[key]!r}" for key, values in NEUTRAL.items() if says.get(key) not in (None, *values)]


def table(path: Path) -> dict[str, Any]:
    """A JSON file's table; empty where there is no such file."""
    return read_table(path) if path.is_file() else {}
