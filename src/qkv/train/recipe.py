"""A recipe is the whole experiment: model, data, objective, optimiser, training and evaluation in one TOML file."""

import dataclasses as dc
import tomllib
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qkv.data import Data
from qkv.decode import Greedy, Search
from qkv.errors import QkvError, SpecError
from qkv.models import EncoderDecoder, Model
from qkv.objectives import Objective
from qkv.parts import Tokens
from qkv.spec import KINDS, Spec, discover, dump, edit, fit, nearest, part, positive, walk
from qkv.train.metric import Metric, ValidationLoss
from qkv.train.optimizer import AdamW, Optimizer
from qkv.zoo import spec_of


@part("train")
class Train(Spec):
    """How long and in what steps to learn."""

    steps: int
    tokens_per_batch: int = 4096
    accumulate: int = 1
    """Batches whose gradients are added up before a step, exactly as one large batch; for auxiliary losses see them."""
    clip: float | None = 1.0
    """The largest norm of the gradient."""
    precision: str = "fp32"
    """fp32, or bf16: matrix products in bfloat16 by autocast, weights and sums in fp32."""
    recompute: bool = False
    """Gradient checkpointing."""
    evaluate_every: int = 1000
    save_every: int = 1000
    patience: int | None = None
    """Stop after this many evaluations without a better score."""
    minutes: float | None = None
    """Save and stop after this long; `--resume` goes on."""
    log_every: int = 50
    seed: int = 0
    device: str = "auto"

    def check(self) -> None:
        whole = (self.steps, self.tokens_per_batch, self.accumulate, self.evaluate_every, self.save_every)
        if min(*whole, self.log_every) < 1:
            raise QkvError("steps, tokens_per_batch, accumulate and every …_every are at least 1")
        positive(self, "patience")
        if min(self.clip or 0, self.minutes or 0) < 0:
            raise QkvError(f"clip and minutes are not negative; found {self.clip} and {self.minutes}")
        if not 0 <= self.seed < 2**63:
            raise QkvError(f"the seed is a whole number from 0 up, not {self.seed}")
        if self.precision not in ("fp32", "bf16"):
            raise QkvError(f"the precision is 'fp32' or 'bf16', not {self.precision!r}")


@part("evaluation")
class Evaluation(Spec):
    """What is measured on the validation set during training, and how predictions are searched for."""

    metric: Metric = ValidationLoss()
    search: Search = Greedy()
    examples: int = 500
    """At most so many validation examples are predicted each time; the loss is over all of them."""
    batch: int = 128
    """So many texts are predicted side by side."""

    def check(self) -> None:
        positive(self, "examples", "batch")


@part("recipe")
class Recipe(Spec):
    """One experiment; its TOML tables are its fields."""

    model: Model
    data: Data
    objective: Objective
    train: Train
    optimizer: Optimizer = AdamW()
    evaluation: Evaluation = Evaluation()

    def check(self) -> None:
        self.objective.refuse(self.model)
        if self.objective.pairs != (self.data.source is not None):
            wanted = (
                "pairs: name the columns source and target" if self.objective.pairs else "text: name the column text"
            )
            raise QkvError(f"the objective {self.objective.kind!r} learns from {wanted} in [data]")
        two = self.data.target_tokenizer is not None
        if isinstance(self.model, EncoderDecoder) and two != isinstance(self.model.target, Tokens):
            raise QkvError(
                "source and target each have a tokenizer exactly where the model has an embedding for each: "
                "set data.target_tokenizer and model.target together, or neither"
            )
        if self.evaluation.metric.reads_text and not self.objective.pairs:
            raise QkvError(f"the metric {self.evaluation.metric.kind!r} compares with target texts; take 'loss' here")


def load_recipe(path: Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `path=value` settings; `SpecError` names the file and the path of the first fault."""
    discover()
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as fault:
        raise QkvError(f"{path} is not UTF-8 (byte {fault.start + 1}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as fault:
        raise QkvError(f"{path} is not sound TOML: {fault}") from None
    settings = [setting if "=" in setting else _refuse(setting) for setting in settings]
    changes = [(key.strip(), parse(value)) for key, _, value in (setting.partition("=") for setting in settings)]
    for key, value in changes:
        if key == "model.preset":
            tables.setdefault("model", {})["preset"] = value
    tables["model"] = expand(tables.get("model"), str(path))
    fields = fields_of(tables, str(path))
    for key, value in changes:
        if key != "model.preset":
            fields = changed(fields, key, value)
    return fit(fields, Recipe, str(path))


def fields_of(tables: dict[str, Any], path: str) -> dict[str, Any]:
    """The fields of a recipe, each by itself: whether they go together is seen when all changes have been made."""
    hints = typing.get_type_hints(Recipe)
    known = {field.name: field.default for field in dc.fields(Recipe)}
    for name in tables.keys() - known.keys() - {"kind"}:
        raise SpecError(path, f"unknown key {name!r}{nearest(name, known)}")
    made = {name: fit(tables[name], hints[name], f"{path}.{name}") for name in known if name in tables}
    for name, default in known.items():
        if name not in made and default is dc.MISSING:
            raise SpecError(path, f"the key {name!r} is missing")
    return {name: made.get(name, default) for name, default in known.items()}


def changed(fields: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The fields after `--set key=value`; a fault names the key as it was typed."""
    try:
        return edit(fields, key.removesuffix(".kind"), partial(named, value))
    except SpecError as fault:
        told = fault.fault
    except QkvError as fault:
        told = str(fault)
    raise SpecError(key, told) from None


def named(value: Any, before: Any) -> Any:
    """The bare name of a part, where one stands, is that part with what it must be told taken from that one."""
    if not (isinstance(value, str) and value in KINDS and isinstance(before, Spec)):
        return value
    told, needed = dump(before), [field.name for field in dc.fields(KINDS[value]) if field.default is dc.MISSING]
    return {"kind": value, **{name: told[name] for name in needed if name in told}}


def _refuse(setting: str) -> str:
    raise QkvError(f"--set takes path=value, such as optimizer.lr=3e-4, not {setting!r}")


def parse(text: str) -> Any:
    """A TOML value; anything that is none is taken as text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def expand(table: Any, path: str) -> Any:
    """The [model] table: a preset with every other key as an edit of it (a path, or tables that nest to one)."""
    if not isinstance(table, dict):
        raise QkvError(f"{path}: the table [model] is missing; give it a preset, or a kind and its fields")
    if "preset" not in table:
        return table
    model = edit(spec_of(table["preset"]), "**.vocab", None)  # the tokenizer's, unless the recipe says otherwise
    for key, value in leaves({key: value for key, value in table.items() if key != "preset"}):
        model = edit(model, key, value)
    return model


def leaves(table: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    """Nested tables as dotted paths; a table with a `kind` is a value."""
    found: list[tuple[str, Any]] = []
    for key, value in table.items():
        below = f"{path}.{key}" if path else key
        found += leaves(value, below) if isinstance(value, dict) and "kind" not in value else [(below, value)]
    return found


def vocabularies(model: Model) -> dict[str, int | None]:
    """Path → size of each vocabulary in a model."""
    return {path: value for path, value in walk(model) if path.split(".")[-1] == "vocab"}


def fitted(model: Model, source: int, target: int) -> Model:
    """The model's vocabularies, where they are not set, from the tokenizers' sizes; a set one must be large enough."""
    for path, value in vocabularies(model).items():
        size = target if path == "target.vocab" else source
        if value is None:
            model = edit(model, path, size)
        elif value < size:
            raise QkvError(f"the tokenizer has {size} tokens and model.{path} is {value}: leave it out or raise it")
    return model
