"""Commands that use a run."""

import dataclasses as dc
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from qkv.cli.engine import Torch, opened
from qkv.errors import QkvError

if TYPE_CHECKING:
    from qkv.decode import OneByOne, Rule, Search
    from qkv.use import Task

S = TypeVar("S", bound="Search")

As_json = Annotated[bool, typer.Option("--json", help="For a program.")]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1, write tokens that are there already less often.")
]
NoRepeat = Annotated[int | None, typer.Option(help="Write no so many tokens in a row twice; 0 does nothing.")]


def searching(beam: int | None, n_best: int, length_penalty: float, sampling: dict[str, Any]) -> Any:
    """The search that the options ask for; None leaves it to the recipe."""
    from qkv.decode import Beam

    search = sampled(sampling)
    if search is not None and beam is not None:
        raise QkvError("take either --beam or the options of sampling")
    if n_best > 1 and beam is None:
        raise QkvError("--n-best needs --beam, whose answers it lists")
    return Beam(size=beam, n_best=n_best, length_penalty=length_penalty) if beam is not None else search


def sampled(options: dict[str, Any], usual: "Search | None" = None) -> "OneByOne | None":
    """The sampling that the options ask for, the rest as is `usual`; None leaves it to the model.

    A temperature of 0 is greedy, and a seed alone turns no sampling on.
    """
    from qkv.decode import Greedy, Sample

    asked = {key: value for key, value in options.items() if value is not None}
    if asked.get("temperature") == 0:
        return Greedy()
    if isinstance(usual, Sample):
        return dc.replace(usual, **asked)
    return Sample(**asked) if asked.keys() - {"seed"} else None


def ruling(repetition_penalty: float | None, no_repeat: int | None) -> "tuple[Rule, ...]":
    """The rules that the options ask for; of the same kind, they take the place of a checkpoint's own."""
    from qkv import decode

    penalty = () if repetition_penalty is None else (decode.RepetitionPenalty(repetition_penalty),)
    return penalty if no_repeat is None else (*penalty, decode.NoRepeat(no_repeat))


def ruled(search: "S | None", usual: "S", rules: "tuple[Rule, ...]") -> "S | None":
    """A search, or the usual one, with these rules; None leaves it to the model."""
    return dc.replace(search or usual, rules=rules) if rules else search


def predict(
    model: Annotated[str, typer.Argument(help="A run, a directory, or a name that `qkv pull` lists.")],
    text: Annotated[str, typer.Argument(help="A text, a file with one text a line, or - for standard input.")],
    beam: Annotated[int | None, typer.Option(help="Beam search of this size.")] = None,
    n_best: Annotated[int, typer.Option(help="How many answers of the beam to print.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="The beam's exponent of the length.")] = 1.0,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that reach p.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Sample from tokens at least p times as likely as the best.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The seed of the sampling.")] = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat: NoRepeat = None,
    tokens: Annotated[int, typer.Option(help="At most so many new tokens of a decoder.")] = 200,
    last: Annotated[bool, typer.Option("--last", help="Use the last checkpoint, not the best.")] = False,
    torch: Torch = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="For a program; a score is Σ log p, a beam's by the length.")
    ] = False,
) -> None:
    """Answer a text as the model was trained to: translate or continue it, fill its masks, name its class or those of
    its tokens; a model that finds answers takes a question and a text with a tab between them.
    """
    from qkv.parts.head import Span, Tagger
    from qkv.use import extract

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    search, rules = searching(beam, n_best, length_penalty, sampling), ruling(repetition_penalty, no_repeat)
    texts, task = lines(text), opened(model, last=last, torch=torch, quiet=True)
    head = task.model.head.spec if task.model.head is not None else None
    if isinstance(head, Tagger):
        show_tags(task, texts, as_json)
        return
    if isinstance(head, Span):
        found = [[extract(task, *parts(line, number))] for number, line in enumerate(texts, 1)]
    else:
        found = task.predict(texts, ruled(search, task.manner.search, rules), tokens=tokens)
    for source, answers in zip(texts, found, strict=True):
        if as_json:
            values = [{"text": answer.text, "score": answer.score} for answer in answers]
            print(json.dumps({"source": source, "answers": values}, ensure_ascii=False))
        else:
            for answer in answers[:n_best]:
                print(answer.text if n_best == 1 else f"{answer.score:.3f}\t{answer.text}")


def show_tags(task: "Task", texts: list[str], as_json: bool) -> None:
    """A line for each token, and an empty one after each text."""
    from qkv.use import tag

    for text in texts:
        tags = tag(task, text)
        if as_json:
            print(json.dumps({"source": text, "tags": [dc.asdict(one) for one in tags]}, ensure_ascii=False))
        else:
            print("".join(f"{one.text}\t{one.label}\t{math.exp(one.score):.4f}\n" for one in tags))


def parts(line: str, number: int) -> tuple[str, str]:
    """A question and the text that it is about."""
    question, tab, context = line.partition("\t")
    if not tab:
        raise QkvError(f"text {number} has no tab: this model takes a question, a tab, and the text with the answer")
    return question, context


def piped() -> str:
    """What stands on standard input, without the end of its last line."""
    return said(sys.stdin.read).removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")


def said(read: Callable[[], str]) -> str:
    """What is read from standard input."""
    try:
        return read()
    except UnicodeDecodeError as fault:
        raise QkvError(f"standard input is not UTF-8 (byte {fault.start + 1})") from None


NAMED = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".md")
"""What ends so, without a space, is taken for the name of a file."""


def lines(text: str) -> list[str]:
    """The texts that an argument names."""
    if text == "-":
        text = piped()
        return text.split("\n") if text else []
    if not text:
        raise QkvError("the text is empty: give one, a file with one text a line, or -")
    try:
        if Path(text).is_dir():
            raise QkvError(f"{text} is a directory; a text, a file with one text a line, or - is expected")
        if Path(text).is_file():
            return Path(text).read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as fault:
        raise QkvError(f"{text} is not UTF-8 (byte {fault.start + 1}); save it as UTF-8") from None
    except OSError:
        pass  # a text too long to be the name of a file
    if text.endswith(NAMED) and not any(map(str.isspace, text)):
        raise QkvError(f"{text} does not exist; a text, a file with one text a line, or - is expected")
    return [text]


def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    data: Annotated[list[str], typer.Argument(help="A data set: one file, or parallel files.")],
    beam: Annotated[int | None, typer.Option(help="Beam search of this size.")] = None,
    length_penalty: Annotated[float, typer.Option(help="The beam's exponent of the length.")] = 1.0,
    last: Annotated[bool, typer.Option("--last", help="Use the last checkpoint, not the best.")] = False,
    as_json: As_json = False,
) -> None:
    """Score a run on a data set: loss, perplexity and the recipe's metric."""
    from qkv.train import Run, Task
    from qkv.train import evaluate as score

    opened = Run(run)
    task = Task(opened.model(last=last), opened.tokenizers)
    search = searching(beam, 1, length_penalty, {})
    scores = score(task, opened.recipe, tuple(data) if len(data) > 1 else data[0], Path(), search=search)
    if as_json:
        print(json.dumps({**scores.values, "seconds": scores.seconds}))
        return
    for name, value in scores.values.items():
        print(f"{name:14} {value:.3f}")


COMMANDS = [predict, evaluate]
