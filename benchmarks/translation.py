"""Multi30k: train the tiny Transformer in one direction and score it on test 2016 (lower-cased BLEU, beam 5).

python -m benchmarks.translation --direction en-de --out runs/en-de [--set train.seed=1 …]; an --out that holds a
run is continued, or only scored if it is complete.
"""

import argparse
from pathlib import Path

import torch
from benchmarks.common import DATA, machine

from qkv.decode import Beam
from qkv.recipes import find
from qkv.train import Run, Task, Trainer, evaluate, load_recipe, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--direction", choices=["en-de", "de-en"], default="en-de")
    parser.add_argument(
        "--data", type=Path, default=DATA / "multi30k", help="a folder with train, val, test_2016_flickr"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    if not options.data.is_dir():
        raise SystemExit(f"{options.data} is missing: Multi30k's raw files (train.en.gz …) are expected there")
    torch.set_num_threads(options.threads)
    source, target = options.direction.split("-")

    def files(name: str) -> tuple[str, str]:
        return tuple(str((options.data / f"{name}.{side}.gz").resolve()) for side in (source, target))

    settings = [
        *(f'data.source="{source}"', f'data.target="{target}"'),
        *(f"data.train={list(files('train'))}", f"data.valid={list(files('val'))}"),
        *("train.precision=bf16", *options.settings),
    ]
    run = (
        Run(options.out)
        if options.out.exists()
        else start(load_recipe(find("translate"), settings), options.out, Path())
    )
    if not run.metrics() or run.metrics()[-1]["step"] < run.recipe.train.steps:
        run = Trainer(run).train()
    task = Task(run.model(), run.tokenizers)
    scores = evaluate(task, run.recipe, files("test_2016_flickr"), Path(), search=Beam(size=5))
    print(f"{machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{options.direction}, {task.model.count():,} parameters, seed {run.recipe.train.seed}")
    print(run.recipe)
    for line in run.metrics():
        if line["split"] == "valid":
            print(f"step {line['step']:6,}  {line['seconds'] / 60:5.1f} min  " + values(line))
    print("test 2016, beam 5:", values(scores.values))


def values(found: dict[str, float]) -> str:
    return "  ".join(f"{name} {found[name]:.3f}" for name in ("loss", "perplexity", "bleu"))


if __name__ == "__main__":
    main()
