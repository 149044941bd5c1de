"""Associative recall: the share of keys whose value each mixer finds, by the number of pairs that it has to hold.

    python -m benchmarks.recall [--only attention gla] [--rates 3e-3 1e-2] [--seeds 3] [--set train.steps=2000]

The recipe `recall` with another mixer in both layers, as it was published; `+ conv` is the same with a convolution
over 4 tokens, by which a value's token knows the key before it, and with a state as large as DeltaNet's. Gates that
are learned begin as published, and forget within some ten to twenty tokens; `slow` has such a state too, and begins
with memories longer than most texts, so that a short training need not find that out first. Attention stands in the
second layer, and the recipe's first tells it the token before. All have the same learning rates at seed 0; other seeds
go on with the rate of the least validation loss. A row is printed as soon as it is done: the mean over seeds and the
range for each number of pairs (a guess among the values of the example is right once in as many); the bytes of the
state after one example, where a window's cache has room to rewind; the rate, the seeds, and the minutes of one run.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from benchmarks.common import machine
from benchmarks.mixers import ONE_LINE, accuracy, state_bytes

from qkv import parts
from qkv.data import AssociativeRecall
from qkv.masks import Window
from qkv.models import SequenceModel
from qkv.recipes import find
from qkv.spec import edit
from qkv.train import Recipe, Trainer, load_recipe, start

HEADS, WIDTH, STATE = 4, 64, 16
SLOW = 1 / 256, 1 / 4
"""Rates with which steps of 0.001 to 0.1 forget half in 28 tokens and more."""


def convolved(system: parts.System) -> parts.Memory:
    return replace(system.memory(WIDTH), conv=4, key_width=STATE, value_width=STATE)


def slow(memory: parts.Memory) -> parts.Memory:
    match memory.decay:
        case parts.StepSize():
            return replace(memory, decay=replace(memory.decay, rates=SLOW))
        case parts.PerChannel():
            return replace(memory, decay=replace(memory.decay, start=4.0))
    raise ValueError(f"{memory.decay} has no beginning")


MIXERS: dict[str, parts.Mixer] = {
    "attention": parts.Attention(HEADS),
    "delta-net": parts.DeltaNet(HEADS),
    "retention + conv": convolved(parts.Retention(HEADS)),
    "gla + conv": convolved(parts.GLA(HEADS)),
    "gla + conv, slow": slow(convolved(parts.GLA(HEADS))),
    "gated-delta-net": parts.GatedDeltaNet(HEADS),
    "gated-delta-net, slow": slow(convolved(parts.GatedDeltaNet(HEADS))),
    "kda": parts.KDA(HEADS),
    "kda, slow": slow(convolved(parts.KDA(HEADS))),
    "mamba2": parts.Mamba2(HEADS, state=STATE),
    "mamba2, slow": parts.Mamba2(HEADS, state=STATE, rates=SLOW),
    "linear-attention + conv": convolved(parts.LinearAttention(HEADS)),
    "mlstm + conv": convolved(parts.MLSTM(HEADS)),
    "mamba": parts.Mamba(state=STATE),
    "retention": parts.Retention(HEADS),
    "gla": parts.GLA(HEADS),
    "linear-attention": parts.LinearAttention(HEADS),
    "mlstm": parts.MLSTM(HEADS),
    "rwkv6": parts.Rwkv6(HEADS),
    "window 16": parts.Attention(HEADS, mask=Window(16)),
    "lstm": parts.LSTM(),
    "gru": parts.GRU(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MIXERS, default=list(MIXERS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="any other setting of the recipe")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    recipe = load_recipe(find("recall"), given.set)
    print(f"{machine()}, {given.threads} threads, torch {torch.__version__}")
    print(f"recipe recall: {recipe.data}\n{recipe.optimizer}\n{recipe.train}\n")
    columns = "".join(f"{f'{pairs} pairs':>20}" for pairs in task(recipe).sizes)
    print(f"{'':24}{columns}{'state bytes':>13}{'rate':>8}{'seeds':>7}{'minutes':>9}", flush=True)
    for name in given.only:
        mixer = MIXERS[name]
        one = edit(recipe, "model.stack.1.attn.f" if isinstance(mixer, parts.Attention) else ONE_LINE, mixer)
        tried = [learned(one, rate, 0) for rate in given.rates]
        best = min(tried, key=lambda found: found.loss)
        runs = [best, *(learned(one, best.rate, seed) for seed in range(1, given.seeds))]
        print(f"{name:24}{row(runs)}", flush=True)


def task(recipe: Recipe) -> AssociativeRecall:
    assert isinstance(recipe.data.valid, AssociativeRecall)
    return recipe.data.valid


@dataclass(frozen=True)
class Learned:
    """One training run; `accuracies` are for each number of pairs."""

    rate: float
    loss: float
    accuracies: tuple[float, ...]
    bytes: int
    minutes: float


def learned(recipe: Recipe, rate: float, seed: int) -> Learned:
    """Carry out a recipe in a folder that is thrown away."""
    recipe = edit(edit(recipe, "optimizer.lr", rate), "train.seed", seed)
    with TemporaryDirectory() as folder:
        trainer = Trainer(start(recipe, Path(folder) / "run", Path()))
        trainer.train()
        loss = [row["loss"] for row in trainer.run.metrics() if row["split"] == "valid"][-1]
    model, valid = trainer.model, task(recipe)
    assert isinstance(model, SequenceModel)
    right = (accuracy(model, trainer.examples, replace(valid, pairs=pairs)) for pairs in valid.sizes)
    return Learned(rate, loss, tuple(right), state_bytes(model, recipe.data.context), trainer.seconds / 60)


def row(runs: Sequence[Learned]) -> str:
    by_pairs = zip(*(run.accuracies for run in runs), strict=True)
    shares = "".join(f"{f'{mean(x):.3f} ({min(x):.2f}–{max(x):.2f})':>20}" for x in by_pairs)
    return f"{shares}{runs[0].bytes:13,}{runs[0].rate:8.0e}{len(runs):7}{mean(run.minutes for run in runs):9.1f}"


if __name__ == "__main__":
    main()
