"""Every mixer in one model, by changing one line of a recipe: what it learns, how fast, and what it keeps.

    python -m benchmarks.mixers [--only attention retention] [--iterations 2000] [--seed 0]
    python -m benchmarks.mixers --recipe recall

The recipe `write` learns tiny-shakespeare by characters (4 layers, 128 wide, 64 of context; the last tenth of the text
is for validation; attention's published figure is 1.88 nats a character). The recipe `recall` learns multi-query
associative recall. Printed are the line that was set; the validation loss, and the share of tokens that score highest
where they should; tokens a second in training, with data and optimiser; milliseconds for the next token after 64 and
after 8,192; and the bytes that the state of one text has then. For these the model has fresh weights, and as many
learned positions as it takes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from benchmarks.common import DATA, in_turn, machine

from qkv.data import Files
from qkv.models import Module, Sequence, SequenceModel
from qkv.parts import Learned
from qkv.recipes import find
from qkv.spec import edit
from qkv.train import Recipe, Run, Trainer, load_recipe, start
from qkv.train.example import Examples

ONE_LINE = "model.stack.*.attn.f"
MIXERS = {
    "attention": None,  # what the recipe has
    "window 16": '{kind="attention", heads=4, mask={kind="window", size=16}}',
    "linear-attention": "linear-attention",
    "retention": "retention",
    "gated-retention": "gated-retention",
    "gla": "gla",
    "hgrn2": "hgrn2",
    "mlstm": "mlstm",
    "delta-net": "delta-net",
    "gated-delta-net": "gated-delta-net",
    "kda": "kda",
    "rwkv6": "rwkv6",
    "mamba": "mamba",
    "mamba2": "mamba2",
    "lstm": "lstm",
    "gru": "gru",
    "rnn": "rnn",
}
NEAR, FAR = 64, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=("write", "recall"), default="write")
    parser.add_argument("--only", nargs="+", choices=MIXERS, default=list(MIXERS))
    settings = options(parser)
    near, far = f"{NEAR:,}", f"{FAR:,}"
    print(f"{'':17}{heading()}{f'decode ms at {near}':>17}{far:>8}{f'bytes at {near}':>16}{far:>12}", flush=True)
    for name in settings.only:
        found = trained(settings.recipe, [*line(name), *settings.set])
        near, far = (decoding(found.recipe, tokens) for tokens in (NEAR, FAR))
        ms = [1e3 * median(times) for times in in_turn({NEAR: near.seconds, FAR: far.seconds}, 5).values()]
        print(
            f"{name:17}{found}{ms[0]:17.2f}{ms[1]:8.2f}{near.bytes:16,}{far.bytes:12,}   {' '.join(line(name))}",
            flush=True,
        )


def line(name: str) -> list[str]:
    """The setting that puts a mixer into a recipe."""
    return [] if MIXERS[name] is None else [f"{ONE_LINE}={MIXERS[name]}"]


# --- training -----------------------------------------------------------------------------------------------------


def options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What these benchmarks share; `set` are a recipe's settings. The machine and the recipe are printed."""
    parser.add_argument("--data", type=Path, default=DATA / "tinyshakespeare" / "input.txt")
    parser.add_argument("--iterations", type=int, help="as many as the recipe has by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="any other setting of the recipe")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    found.set += [f"train.seed={found.seed}"]
    if found.recipe == "write":
        if not found.data.exists():
            sys.exit(f"{found.data} is missing: tiny-shakespeare's input.txt, or give another text with --data")
        found.set += [f'data.train="{found.data.resolve()}"']
    if found.iterations:
        found.set += [f"train.steps={found.iterations}"]
    recipe = load_recipe(find(found.recipe), found.set)
    print(f"{machine()}, {found.threads} threads, torch {torch.__version__}, decoding in torch, fp32")
    print(f"recipe {found.recipe}: {recipe.data}\n{recipe.optimizer}\n{recipe.train}\n")
    return found


@dataclass(frozen=True)
class Trained:
    """One training run."""

    recipe: Recipe
    parameters: int
    loss: float
    accuracy: float
    tokens_per_second: float
    minutes: float

    def __str__(self) -> str:
        rate = f"{self.tokens_per_second:10,.0f}{self.minutes:9.1f}"
        return f"{self.parameters / 1e6:12.2f}{self.loss:8.3f}{self.accuracy:10.3f}{rate}"


def heading() -> str:
    return f"{'M parameters':>12}{'loss':>8}{'accuracy':>10}{'tokens/s':>10}{'minutes':>9}"


def trained(name: str, settings: list[str]) -> Trained:
    """Carry out a recipe in a folder that is thrown away."""
    recipe = load_recipe(find(name), [*settings, "train.log_every=10"])
    with TemporaryDirectory() as folder:
        run: Run = start(recipe, Path(folder) / "run", Path())
        trainer = Trainer(run)
        trainer.train()
        rows = run.metrics()
    rates = [row["tokens_per_second"] for row in rows if row["split"] == "train"]
    loss = [row["loss"] for row in rows if row["split"] == "valid"][-1]
    right = accuracy(trainer.model, trainer.examples)
    return Trained(run.recipe, trainer.model.count(), loss, right, median(rates), trainer.seconds / 60)


@torch.inference_mode()
def accuracy(model: Module, examples: Examples, files: Files | float | None = None) -> float:
    """The share of a data set's labels that score highest; None is the validation set."""
    right = labels = 0
    model.eval()
    for example in examples.evaluation(examples.recipe.data.valid if files is None else files):
        x = model.hidden(example.inputs, lengths=example.lengths)[example.chosen]
        right += int((model.logits(x).argmax(-1) == example.labels).sum())
        labels += example.tokens
    return right / labels


# --- decoding -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoding:
    """A text of some length that is to go on."""

    seconds: Callable[[], float]
    """Measures the time of one more token."""
    bytes: int
    """What is kept of the text."""


@torch.inference_mode()
def decoding(recipe: Recipe, tokens: int, count: int = 32) -> Decoding:
    """The recipe's model with fresh weights after so many tokens; a measure takes `count` more, and forgets them."""
    assert isinstance(recipe.model, Sequence)
    model = edit(recipe.model, "embed.position", Learned(tokens + count)).build().eval()
    state, one = model.new_state(1, tokens + count), torch.full((1, 1), 5)
    for ids in torch.randint(5, model.spec.embed.vocab, (1, tokens)).split(1024, 1):
        model.hidden(ids, state=state)

    @torch.inference_mode()
    def seconds() -> float:
        now = state.fork()
        model(one, state=now)
        began = time.perf_counter()
        for _ in range(count - 1):
            model(one, state=now)
        return (time.perf_counter() - began) / (count - 1)

    return Decoding(seconds, state_bytes(model, tokens))


def state_bytes(model: SequenceModel, tokens: int) -> int:
    """What the state of one text holds after so many tokens."""
    cells = model.new_state(1, tokens)
    return sum(x.numel() * x.element_size() for cell in cells for x in cell.tensors().values())


if __name__ == "__main__":
    main()
