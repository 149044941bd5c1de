"""A published configuration, read key by key.

Every key is taken, asserted or inert; what is left at the end is an error, because a key that is silently ignored is
how a wrong model runs. Values come from a file that nobody has checked: each is asked for by its type and range.
"""

from collections.abc import Collection, Mapping
from reprlib import repr as shown
from typing import Any, TypeVar

from qkv.errors import QkvError
from qkv.spec import nearest

T = TypeVar("T")
MOST = 2**31
DEEPEST = 512
LEAST_NUMBER, MOST_NUMBER = 1e-38, 1e38
"""Between them fp32 holds every number, with either sign, in full precision."""

INERT = """
    _name_or_path _commit_hash architectures attn_implementation auto_map begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cls_token_id dtype eos_token_id eos_token_ids tie_encoder_decoder xla_device
    finetuning_task gradient_checkpointing id2label initializer_range is_encoder_decoder
    label2id mask_token_id model_type num_labels output_attentions output_hidden_states output_past pad_token_id
    problem_type return_dict sep_token_id task_specific_params tokenizer_class torch_dtype
    torchscript transformers_version use_bfloat16 use_cache use_return_dict decoder_start_token_id
    transformers.js_config _attn_implementation_autoset _flash_attn_2_enabled _num_labels unsloth_fixed
    unsloth_version
    bad_words_ids do_sample diversity_penalty early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_scores prefix remove_invalid_values repetition_penalty
    return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
"""What changes no number that a model computes: names, special ids, settings of generation and of training."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu-tanh",
    "gelu_fast": "gelu-tanh",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


class Config:
    """The values of a config.json and the names of the tensors beside it; `where` begins every error sentence."""

    def __init__(self, values: Mapping[str, Any], keys: Collection[str] = (), where: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise QkvError(f"{where} is no table of keys and values")
        self.values, self.keys, self.where = values, keys, where
        self.used = set(INERT.split())

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    # --- taken ---

    def integer(self, key: str, default: int | None = None, *, least: int = 1, most: int = MOST) -> int:
        """A whole number from `least` to `most`."""
        value = self.value(key, default, int)
        if not least <= value <= most:
            raise QkvError(
                f"{self.where}: {key} is {shown(value)}; a whole number from {least:,} to {most:,} is expected"
            )
        return value

    def optional(self, key: str) -> int | None:
        """A whole number from 1, or None where the key is absent or null."""
        self.used.add(key)
        return self.integer(key) if key in self else None

    def depth(self, key: str, default: int | None = None) -> int:
        """A number of layers, each of which has tensors of its own."""
        return self.integer(key, default, most=min(DEEPEST, len(self.keys) or DEEPEST))

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.value(key, default, float)
        if value and not LEAST_NUMBER <= abs(value) <= MOST_NUMBER:
            raise QkvError(f"{self.where}: {key} is {value}; a finite number is expected, which fp32 can hold")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        return self.value(key, default, bool)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        return self.value(key, default, str)

    def act(self, key: str, default: str | None = None) -> str:
        """An activation, by our name."""
        name = self.text(key, default)
        if name not in ACTIVATIONS:
            raise QkvError(f"{self.where}: {key} is {shown(name)}{nearest(name[:64], ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def list(self, key: str, kind: type[T], size: int | None = None) -> list[T]:
        """A list of `size` values of one type; empty where the key is absent and no size is asked for."""
        values = self.value(key, [], list)
        if size is not None and len(values) != size:
            raise QkvError(f"{self.where}: {key} holds {len(values)} values; {size} are expected")
        if len(values) > DEEPEST:
            raise QkvError(f"{self.where}: {key} holds {len(values)} values; {DEEPEST} are the most that a model needs")
        return [self.typed(value, kind, f"{key} holds") for value in values]

    def table(self, key: str) -> "Config":
        """A table in the table, to be closed by itself; empty where it is absent."""
        found = Config(self.value(key, {}, dict), self.keys, f"{self.where}: {key}")
        found.used = set()
        return found

    def value(self, key: str, default: T | None, kind: type[T]) -> T:
        self.used.add(key)
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise QkvError(f"{self.where} lacks the key {key!r}")
            return default
        return self.typed(value, kind, f"{key} is")

    def typed(self, value: Any, kind: type[T], said: str) -> T:
        if kind is float and type(value) is int and abs(value) <= MOST_NUMBER:
            value = float(value)
        if type(value) is not kind:
            raise QkvError(f"{self.where}: {said} {shown(value)}, which is not of the type {kind.__name__}")
        return value

    # --- asserted and inert ---

    def only(self, key: str, *values: Any) -> None:
        """Refuse every other value; an absent key or null is the first one's like."""
        self.used.add(key)
        found = self.values.get(key)
        if found is not None and found not in values:
            said = " or ".join(map(repr, values)) or "nothing"
            raise QkvError(f"{self.where}: {key} is {shown(found)}, for which qkv has no part; it runs {said}")

    def ignore(self, *keys: str) -> None:
        """Keys that change no number: training settings, remarks."""
        self.used.update(keys)

    def close(self) -> None:
        """Refuse what nothing has read."""
        left = sorted(key for key, value in self.values.items() if key not in self.used and value is not None)
        if left:
            raise QkvError(
                f"{self.where} has keys that this family does not know: {', '.join(map(shown, left[:6]))}; "
                "ignoring them could run another model than the one that was published"
            )

    # --- what several families ask ---

    @property
    def task(self) -> str:
        """What the model is for: MaskedLM, CausalLM, SequenceClassification, …; empty for a bare model."""
        names = self.values.get("architectures") or [""]
        name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        return name.partition("For")[2] or ("CausalLM" if name.endswith("LMHeadModel") else "")

    def headless(self) -> None:
        """Refuse a class that has a head which no part makes."""
        if self.task:
            raise QkvError(
                f"{self.where}: architectures is {self.values['architectures']}; qkv has no head for {self.task}"
            )

    def labels(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        names, count = self.value("id2label", {}, dict), self.optional("num_labels")
        if not names or count not in (None, len(names)):  # an old file may keep two names for 50 classes
            return tuple(f"LABEL_{n}" for n in range(self.integer("num_labels", 2, most=2**16)))
        try:
            found = {int(number): name for number, name in names.items()}
        except ValueError:
            found = {}
        if sorted(found) != list(range(len(names))) or not all(isinstance(name, str | int) for name in found.values()):
            raise QkvError(f"{self.where}: id2label is no table from the numbers 0, 1, … to names")
        return tuple(str(found[n]) for n in range(len(found)))

    def tied(self, matrix: str, default: bool = True) -> bool:
        """Whether the head shares the embedding's table: as it says, else by whether the file has such a matrix."""
        if self.values.get("tie_word_embeddings") is None and self.keys:
            return default or matrix not in self.keys
        return self.flag("tie_word_embeddings", default)
