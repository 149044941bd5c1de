"""The report of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from qkv.look.attention import Attended, attend
from qkv.look.report import AttentionView, Report, Sample, write
from qkv.train import Run, Scores, Task

T = TypeVar("T")

MEANING = {
    "loss": "nats per token on held-out text; lower is better",
    "perplexity": "how many tokens the model hesitates between; lower is better",
    "bleu": "overlap with the reference translations, 0 to 100; higher is better",
    "chrf": "overlap of character n-grams with the references, 0 to 100; higher is better",
    "word_error": "per cent of answers that equal no reference; lower is better",
    "symbol_error": "edits per hundred symbols of the references; lower is better",
}


def write_report(
    run: Run, task: Task, path: Path, *, title: str, scores: Scores | None = None, texts: Sequence[str] = (),
    shown: int = 40,
) -> Path:  # fmt: skip
    """Write a run's report: curves, scores, samples, and the attention over each of `texts`."""
    values: dict[str, float] = scores.values if scores is not None else {}
    samples = [
        Sample(sample.source, sample.prediction.text, sample.references)
        for sample in spread(scores.samples if scores is not None else [], shown)
    ]
    return write(
        Report(
            title=title,
            summary=summary(run, task),
            scores=[(name, f"{value:.2f}", MEANING.get(name, "")) for name, value in values.items()],
            metrics=run.metrics(),
            samples=samples,
            attention=[view for text in texts for view in views(run, task, text)],
        ),
        path,
    )


def spread(samples: Sequence[T], most: int) -> Sequence[T]:
    """At most so many, evenly from the first to the last."""
    return [samples[n * len(samples) // most] for n in range(most)] if len(samples) > most else samples


def summary(run: Run, task: Task) -> list[tuple[str, str]]:
    """What was trained on what, and for how long."""
    recipe, metrics, train = run.recipe, run.metrics(), run.recipe.data.train
    facts: list[tuple[str, Any]] = [
        ("model", f"{task.model.count() / 1e6:.2f} M parameters, width {getattr(recipe.model, 'width', '')}"),
        ("trained on", " + ".join(train) if isinstance(train, tuple) else str(train)),
        ("objective", recipe.objective.kind),
        ("optimiser", f"{recipe.optimizer.kind}, {recipe.optimizer.schedule.kind}, peak lr {recipe.optimizer.lr:g}"),
    ]
    if metrics:
        facts.append(("steps", f"{metrics[-1]['step']:,} of {recipe.train.steps:,}"))
        facts.append(("time", f"{metrics[-1]['seconds'] / 60:.1f} minutes"))
    return [(name, str(fact)) for name, fact in facts]


def views(run: Run, task: Task, text: str) -> list[AttentionView]:
    """The attention over a text that says most: from answer to source where there is one, else within the text."""
    pairs = run.recipe.objective.pairs
    answer = task.predict([text], run.recipe.evaluation.search)[0][0] if pairs else None
    attended = attend(task, text, answer)
    chosen = [one for one in attended if one.kind == "cross"] or attended
    return [
        AttentionView(
            (f"{text} → {answer.text}" if answer is not None else text) + captioned(one),
            one.rows,
            one.columns,
            one.weights.flatten(0, 1).numpy(),
            [f"layer {layer}, head {head + 1}" for layer in one.numbers for head in range(one.weights.shape[1])],
        )
        for one in chosen
    ]


def captioned(one: Attended) -> str:
    """What is measured, where it is not the usual."""
    return "" if one.measure == Attended.measure else f" ({one.measure})"
