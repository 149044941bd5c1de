"""Spelling to sound: train the 3×256 Transformer on the CMU pronouncing dictionary, score it on held-out words.

python -m benchmarks.spelling --out runs/speak [--set …]; words are split by a hash (5 % test, 2 % valid), sounds are
without stress, a word is right if it equals any of its pronunciations. An --out that holds a run is continued.
"""

import argparse
from pathlib import Path

import torch
from benchmarks.common import machine

from qkv.checkpoints.pull import pull
from qkv.data.cmudict import write_pairs
from qkv.decode import Beam
from qkv.recipes import find
from qkv.train import Run, Task, Trainer, evaluate, load_recipe, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = options.out.with_name(options.out.name + "-data")
    if not data.exists():
        write_pairs(pull("cmudict") / "cmudict.dict", data)
    run = (
        Run(options.out)
        if options.out.exists()
        else start(load_recipe(find("speak"), ["train.precision=bf16", *options.settings]), options.out, data)
    )
    if not run.metrics() or run.metrics()[-1]["step"] < run.recipe.train.steps:
        run = Trainer(run).train()
    task = Task(run.model(), run.tokenizers)
    print(f"{machine()}, {options.threads} threads, torch {torch.__version__}")
    print(f"{task.model.count():,} parameters, seed {run.recipe.train.seed}")
    print(run.recipe)
    for line in run.metrics():
        if line["split"] == "valid":
            print(f"step {line['step']:6,}  {line['seconds'] / 60:5.1f} min  " + values(line))
    for size in (1, 4):
        scores = evaluate(task, run.recipe, "test.tsv", data, search=Beam(size=size))
        print(f"{len(scores.samples):,} test words, beam {size}:", values(scores.values))


def values(found: dict[str, float]) -> str:
    return "  ".join(f"{name} {found[name]:.2f}" for name in ("loss", "word_error", "symbol_error"))


if __name__ == "__main__":
    main()
