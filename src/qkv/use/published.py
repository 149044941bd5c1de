"""A published checkpoint, ready to use."""

from pathlib import Path
from typing import Any

import torch

from qkv.checkpoints.directory import read_table
from qkv.checkpoints.gguf_model import GGUFModel
from qkv.checkpoints.llama2c import read_tokenizer
from qkv.checkpoints.llama2c_model import Llama2CModel
from qkv.checkpoints.load import Source, load_published
from qkv.checkpoints.opening import opened
from qkv.data import Tokenizer, Tokenizers, load_tokenizer, tokenizer_from_gguf, tokenizer_from_llama2c
from qkv.decode import Beam, Greedy, Rule, Sample, Search
from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Module
from qkv.spec import load
from qkv.use.task import Manner, Task


def open_published(path: Path, dtype: torch.dtype | None = None, *, packed: bool = False) -> Task:
    """The model of a directory or file that others published, its tokenizer, and how it wants to be used."""
    source = opened(path, dtype, packed=packed)
    tokenizer = tokenizer_of(source)
    if isinstance(source, GGUFModel):
        source.release()  # lists of all tokens, beside which the weights would have to find room
    model = load_published(source, dtype)
    return task_of(source, tokenizer, model)


def task_of(source: Source, tokenizer: Tokenizer, model: Module) -> Task:
    """The same of a checkpoint that is open."""
    own = (source.path / "target.spm").is_file()
    target = load_tokenizer(source.path, "target") if own else tokenizer
    wanted = manner(source, isinstance(model, EncoderDecoderModel))
    task = Task(model, Tokenizers(tokenizer, target), wanted)
    rows = len(model.wiring.embed.table)
    if task.pairs and not all(0 <= i < rows for i in wanted.begin):
        raise QkvError(f"{source.path} says that an answer begins with the tokens {wanted.begin}; the model has {rows}")
    return task


def bare(source: Source) -> bool:
    """Whether a checkpoint is a GGUF file of nothing but weights."""
    return isinstance(source, GGUFModel) and source.file.metadata.get("tokenizer.ggml.model", "none") == "none"


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer in a checkpoint, or beside it."""
    if isinstance(source, GGUFModel):
        if bare(source):
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


def manner(source: Source, pairs: bool) -> Manner:
    """What a checkpoint's configuration says of its use; `pairs` is whether it reads one text and writes another."""
    where = source.path / "generation_config.json"
    says = {**source.config, **table(where)}
    start = says.get("decoder_start_token_id")
    start = says.get("bos_token_id") if start is None else start
    longest = table(source.path / "sentence_bert_config.json").get("max_seq_length")
    return Manner(
        search=search(says, pairs, str(where)),
        begin=(start,) if isinstance(start, int) else (),
        unheeded=tuple(unheeded(says)),
        longest=longest if isinstance(longest, int) and longest > 0 else None,
    )


def search(says: dict[str, Any], pairs: bool = False, where: str = "generation_config.json") -> Search:
    """The search that a generation_config.json asks for."""
    beams, penalty, heeded = says.get("num_beams"), says.get("length_penalty"), rules(says, pairs, where)
    if isinstance(beams, int) and beams > 1:
        alpha = float(penalty) if isinstance(penalty, int | float) else 1.0
        early = says.get("early_stopping") is True
        return Beam(size=beams, length_penalty=alpha, early_stopping=early, rules=heeded)
    if says.get("do_sample") is not True:
        return Greedy(rules=heeded)
    asked = {key: says.get(key) for key in ("temperature", "top_k", "top_p", "min_p")}
    given = {key: value for key, value in asked.items() if value}
    made: Sample = load({"kind": "sample", **given, "rules": heeded}, Sample, where)
    return made


RULES = {
    "repetition_penalty": ("repetition-penalty", "penalty"), "no_repeat_ngram_size": ("no-repeat", "size"),
    "bad_words_ids": ("ban", "words"), "min_length": ("at-least", "tokens"), "min_new_tokens": ("at-least", "tokens"),
    "forced_bos_token_id": ("force-first", "token"), "forced_eos_token_id": ("force-last", "token"),
    "suppress_tokens": ("suppress", "tokens"), "begin_suppress_tokens": ("suppress-first", "tokens"),
}  # fmt: skip
"""Settings of generation, in the order in which they are applied; the rule that each is, and the field it fills."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1,), "no_repeat_ngram_size": (0,), "bad_words_ids": ([],), "min_length": (0,),
    "min_new_tokens": (0,), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "early_stopping": (False, True), "typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,), "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (), "renormalize_logits": (False,), "guidance_scale": (1,),
    "num_beam_groups": (1,), "diversity_penalty": (0,), "penalty_alpha": (0,),
}  # fmt: skip
"""The values at which settings of generation do nothing that is not done here."""


def rules(says: dict[str, Any], pairs: bool, where: str) -> tuple[Rule, ...]:
    """The rules that a generation_config.json asks for."""
    asked = {key: says[key] for key in RULES if says.get(key) not in (None, *NEUTRAL.get(key, ()))}
    if not pairs:  # a decoder's first new token follows the prompt
        asked.pop("forced_bos_token_id", None)
    if "min_new_tokens" in asked:
        asked.pop("min_length", None)
    if isinstance(last := asked.get("forced_eos_token_id"), list) and last:
        asked["forced_eos_token_id"] = last[0]  # any of them ends a text
    after = int("forced_bos_token_id" in asked)
    more: dict[str, dict[str, Any]] = {"min_length": {"prompt": True}, "begin_suppress_tokens": {"after": after}}
    made = {key: {"kind": RULES[key][0], RULES[key][1]: value, **more.get(key, {})} for key, value in asked.items()}
    return tuple(load(rule, Rule, f"{where}.{key}") for key, rule in made.items())


def unheeded(says: dict[str, Any]) -> list[str]:
    """The settings of a checkpoint's generation that are not followed."""
    kept = [key for key in NEUTRAL if key not in RULES]
    return [f"{key} = {says[key]!r}" for key in kept if says.get(key) not in (None, *NEUTRAL[key])]


def table(path: Path) -> dict[str, Any]:
    """A JSON file's table; empty where there is no such file."""
    return read_table(path) if path.is_file() else {}
