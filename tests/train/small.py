"""A small experiment: words are spelt backwards."""

import random
from pathlib import Path

from qkv.train import Recipe, Run, load_recipe, start

RECIPE = """
[model]
preset = "transformer-tiny"
width = 32
"**.depth" = 1
"**.hidden" = 32
"**.dropout" = 0.1

[data]
train = "train.tsv"
valid = "valid.tsv"
source = "word"
target = "back"
tokenizer = { kind = "character" }

[objective]
kind = "seq2seq"
label_smoothing = 0.1

[optimizer]
kind = "adamw"
lr = 5e-3
schedule = { kind = "cosine", warmup = 4 }

[train]
steps = 12
tokens_per_batch = 256
evaluate_every = 6
save_every = 4
log_every = 2

[evaluation]
metric = { kind = "error-rate" }
examples = 8
"""


def write_data(folder: Path, examples: int = 200) -> None:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcde", k=chance.randint(2, 9))) for _ in range(examples)]
    for name, chosen in (("train", words), ("valid", words[:20])):
        rows = "".join(f"{word}\t{word[::-1]}\n" for word in chosen)
        (folder / f"{name}.tsv").write_text(f"word\tback\n{rows}", encoding="utf-8")


def recipe(folder: Path, *settings: str) -> Recipe:
    write_data(folder)
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return load_recipe(folder / "recipe.toml", ["data.max_tokens=40", *settings])


def small_run(folder: Path, *settings: str, name: str = "run") -> Run:
    return start(recipe(folder, *settings), folder / name, folder)
