"""Loss and metric on a data set."""

import dataclasses as dc
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from qkv.data import Files, records
from qkv.decode import Search
from qkv.errors import QkvError
from qkv.train.example import Examples
from qkv.train.metric import Metric
from qkv.train.recipe import Recipe
from qkv.use import Prediction, Task


@dc.dataclass(frozen=True)
class Sample:
    """A source, what was predicted for it, and what was expected."""

    source: str
    prediction: Prediction
    references: tuple[str, ...]


@dc.dataclass(frozen=True)
class Scores:
    """What an evaluation found."""

    values: dict[str, float]
    samples: list[Sample]
    seconds: float


def evaluate(
    task: Task, recipe: Recipe, files: Files | float, base: Path, *, search: Search | None = None,
    examples: int | None = None, read: Examples | None = None,
) -> Scores:  # fmt: skip
    """Loss (nats per token) and perplexity over a data set, and the recipe's metric over its first `examples` texts.

    `read` are examples of the recipe of which this set may have been read before.
    """
    began, model, objective = time.perf_counter(), task.model, recipe.objective
    total = tokens = 0.0
    with torch.inference_mode(), model.evaluating():
        for example in (read or Examples(recipe, task.tokenizers, base)).evaluation(files):
            total += float(objective.loss(model, example.to(model.device), smooth=False))
            tokens += example.tokens
    if not tokens:
        raise QkvError(f"{files} holds nothing that the objective {objective.kind!r} could be scored on")
    loss = total / tokens
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    samples: list[Sample] = []
    metric = recipe.evaluation.metric
    if metric.reads_text:
        samples = predictions(task, recipe, files, base, search or recipe.evaluation.search, examples)
        values |= score(metric, samples)
    if not all(map(math.isfinite, values.values())):
        raise QkvError(f"the evaluation of {files} gave {values}: the model is broken, lower the learning rate")
    return Scores(values, samples, time.perf_counter() - began)


def score(metric: Metric, samples: Sequence[Sample]) -> dict[str, float]:
    return metric.score([sample.prediction.text for sample in samples], [sample.references for sample in samples])


def predictions(
    task: Task, recipe: Recipe, files: Files | float, base: Path, search: Search, examples: int | None
) -> list[Sample]:
    """Predict each distinct source once; see `Metric.alternatives` for what its targets are."""
    references: dict[str, list[str]] = {}
    for record in records(recipe.data, files, base)(0):
        source, target = record.values
        if examples is None or source in references or len(references) < examples:
            references.setdefault(source, []).append(target)
    if not references:
        raise QkvError(f"{files} holds no example to evaluate on")
    found = task.predict(list(references), search, batch=recipe.evaluation.batch)
    samples: list[Sample] = []
    for (source, targets), answers in zip(references.items(), found, strict=True):
        rows = [tuple(dict.fromkeys(targets))] if recipe.evaluation.metric.alternatives else [(one,) for one in targets]
        samples += [Sample(source, answers[0], row) for row in rows]
    return samples


def refuse_early(recipe: Recipe, base: Path) -> None:
    """Find out before anything is trained what an evaluation would stumble over hours later."""
    metric, valid = recipe.evaluation.metric, recipe.data.valid
    if metric.reads_text:
        score(metric, [Sample("", Prediction("a", 0.0, []), ("a",))])  # whether its library is there
    for files in (recipe.data.train, valid):
        if files is not None and not isinstance(files, float):
            next(records(recipe.data, files, base)(0), None)
