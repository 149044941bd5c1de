"""Commands that use a run."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qkv.errors import QkvError

As_json = Annotated[bool, typer.Option("--json", help="For a program.")]


def searching(beam: int | None, n_best: int, length_penalty: float, sampling: dict[str, Any]) -> Any:
    """The search that the options ask for; None leaves it to the recipe."""
    from qkv.decode import Beam, Sample

    asked = {key: value for key, value in sampling.items() if value is not None}
    if asked and beam is not None:
        raise QkvError("take either --beam or the options of sampling")
    if n_best > 1 and beam is None:
        raise QkvError("--n-best needs --beam, whose answers it lists")
    if asked:
        return Sample(**asked)
    return Beam(size=beam, n_best=n_best, length_penalty=length_penalty) if beam is not None else None


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
    tokens: Annotated[int, typer.Option(help="At most so many new tokens of a decoder.")] = 200,
    last: Annotated[bool, typer.Option("--last", help="Use the last checkpoint, not the best.")] = False,
    as_json: As_json = False,
) -> None:
    """Answer a text: translate it, continue it, fill its masks, or name its class, as the model was trained to."""
    from qkv.train.run import open_task

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    search = searching(beam, n_best, length_penalty, sampling)
    texts, task = lines(text), open_task(model, last=last)
    for source, answers in zip(texts, task.predict(texts, search, tokens=tokens), strict=True):
        if as_json:
            found = [{"text": answer.text, "score": answer.score} for answer in answers]
            print(json.dumps({"source": source, "answers": found}, ensure_ascii=False))
        else:
            for answer in answers[:n_best]:
                print(answer.text if n_best == 1 else f"{answer.score:.3f}\t{answer.text}")


def lines(text: str) -> list[str]:
    """The texts that an argument names."""
    if text == "-":
        return [line.rstrip("\n") for line in sys.stdin]
    try:
        if Path(text).is_dir():
            raise QkvError(f"{text} is a directory; a text, a file with one text a line, or - is expected")
        if Path(text).is_file():
            return Path(text).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as fault:
        raise QkvError(f"{text} is not UTF-8 (byte {fault.start + 1}); save it as UTF-8") from None
    except OSError:
        pass  # a text too long to be the name of a file
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
