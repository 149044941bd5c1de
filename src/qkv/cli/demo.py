"""The demo: from spelling to sound, from nothing to a report, in a few minutes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

NAMES = ("targaryen", "kubernetes", "pytorch", "quidditch", "pikachu", "wakanda", "nightwalker", "rivendell", "qwerty")
"""Words that people say and the dictionary lacks."""
SHOWN = ("transformer", "attention", "phonology", "knighthood")


def run(folder: Path, settings: Sequence[str], out: TextIO) -> None:
    """Fetch the dictionary, train, evaluate on held-out words, say new names, write the report."""
    from rich.console import Console
    from rich.table import Table

    from qkv.checkpoints.pull import pull
    from qkv.data.cmudict import write_pairs
    from qkv.look import write_report
    from qkv.look.fonts import require
    from qkv.recipes import find
    from qkv.train import Run, Task, Trainer, evaluate, load_recipe, start
    from qkv.train.run import RUN

    require("matplotlib")
    console = Console(file=out, highlight=False)
    console.print("[bold]1[/]  The CMU pronouncing dictionary")
    dictionary = pull("cmudict")
    counts = write_pairs(dictionary / "cmudict.dict", folder)
    console.print(f"   {counts['train']:,} words to learn from, {counts['test']:,} held out")
    console.print("[bold]2[/]  A Transformer that reads letters and writes sounds")
    if (folder / "run" / RUN).is_file():  # of an earlier demo
        shutil.rmtree(folder / "run")
    trained = start(load_recipe(find("demo"), settings), folder / "run", folder)
    Trainer(trained).train()
    trained = Run(folder / "run")
    task = Task(trained.model(), trained.tokenizers)
    console.print("[bold]3[/]  Held-out words")
    scores = evaluate(task, trained.recipe, "test.tsv", folder)
    word, symbol = scores.values["word_error"], scores.values["symbol_error"]
    console.print(
        f"   {100 - word:.1f} % of {len(scores.samples):,} words wholly right; {symbol:.1f} % of phonemes wrong"
    )
    console.print("[bold]4[/]  Names that no dictionary has")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 3))
    for name, answers in zip(NAMES, task.predict(NAMES, trained.recipe.evaluation.search), strict=True):
        table.add_row(name, answers[0].text)
    console.print(table)
    path = write_report(
        trained, task, folder / "report.html", title="Spelling to sound", scores=scores, texts=[*SHOWN, *NAMES[:4]]
    )
    console.print(f"[bold]5[/]  The report, with what each sound looked at: {path}")
