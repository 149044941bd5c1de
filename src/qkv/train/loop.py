"""The training loop."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from qkv.data import train_tokenizers
from qkv.errors import QkvError
from qkv.objectives import Example
from qkv.spec import edit
from qkv.train.evaluation import Scores, evaluate, refuse_early
from qkv.train.example import Examples
from qkv.train.progress import Board, Watch
from qkv.train.recipe import Recipe, fitted
from qkv.train.run import BOARD, Moment, Run, refuse_taken
from qkv.use import Task

NOTHING: dict[str, float] = {"loss": 0.0, "tokens": 0, "steps": 0, "seconds": 0.0}
"""What is added up from one logged line to the next."""


class Stopped(Exception):
    """Training was asked to stop; all is saved. `code` is the exit status that fits the signal."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def start(recipe: Recipe, folder: Path, base: Path) -> Run:
    """Make a run: train its tokenizers, and set the model's vocabularies from them."""
    refuse_taken(folder)
    refuse_early(recipe, base)
    tokenizers = train_tokenizers(recipe.data, base)
    model = fitted(recipe.model, tokenizers.source.size, tokenizers.target.size)
    return Run.create(folder, edit(recipe, "model", model), base, tokenizers)


class Trainer:
    """One run in training: the model, its optimiser, and where it stands.

    A resumed run continues bit for bit: model, optimiser, position in the data and every random state are saved.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.recipe, self.settings = run, run.recipe, run.recipe.train
        self.device = device_of(self.settings.device)
        torch.manual_seed(self.settings.seed)
        self.model = self.recipe.model.build().to(self.device).recompute(self.settings.recompute)
        self.task = Task(self.model, run.tokenizers)
        self.optimizer = self.recipe.optimizer.build(self.model)
        self.examples = Examples(self.recipe, run.tokenizers, run.base)
        self.look_ahead()
        self.step, self.seconds, self.worse = 0, 0.0, 0
        self.best: float | None = None
        self.window = dict(NOTHING)
        if run.last is not None:
            self.restore(run.moment())

    def look_ahead(self) -> None:
        """Find an example that is too long for the model, or a set that teaches nothing, now and not hours later."""
        data, room = self.recipe.data, self.model.positions
        refuse_early(self.recipe, self.run.base)
        if data.valid is not None and not any(example.tokens for example in self.examples.evaluation(data.valid)):
            kind = self.recipe.objective.kind
            raise QkvError(f"{data.valid} holds nothing that the objective {kind!r} could be scored on")
        if room is None:
            return
        if data.longest > room:
            name = "max_tokens" if data.text is None else "context"
            raise QkvError(
                f"data.{name} is {data.longest} and the model has {room} positions: lower it, or raise those"
            )
        if data.valid is not None:
            longest = max(example.longest for example in self.examples.evaluation(data.valid))
            if longest > room:
                raise QkvError(
                    f"{data.valid} has an example of {longest} tokens and the model {room} positions: drop it"
                )

    # --- what is kept ---

    def moment(self) -> Moment:
        tensors = {
            f"{name}:{key}": value.cpu()
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        tensors |= {"random": torch.get_rng_state(), "corruption": self.examples.generator.get_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        data = self.examples.training.state()
        values = {"data": data, "best": self.best, "worse": self.worse, "seconds": self.seconds, "window": self.window}
        return Moment(self.step, tensors, values)

    def restore(self, moment: Moment) -> None:
        self.model.load_state_dict(self.run.model(last=True).state_dict())
        self.step, tensors = moment.step, moment.tensors
        self.best, self.worse, self.seconds = (moment.values[key] for key in ("best", "worse", "seconds"))
        self.window = dict(moment.values.get("window", NOTHING))
        self.examples.training.restore(moment.values["data"])
        self.examples.generator.set_state(tensors.pop("corruption"))
        torch.set_rng_state(tensors.pop("random"))
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("random.cuda"), self.device)
        parameters = dict(self.model.named_parameters())
        for name, tensor in tensors.items():
            parameter, _, key = name.partition(":")
            on = tensor if key == "step" and self.device.type == "cpu" else tensor.to(self.device)
            self.optimizer.state[parameters[parameter]][key] = on

    # --- one step ---

    def learn(self, examples: Sequence[Example]) -> float:
        """One step on several batches, as if they were one → the loss in nats per token."""
        tokens, total = sum(example.tokens for example in examples), 0.0
        bf16 = self.settings.precision == "bf16"
        for example in examples:
            with torch.autocast(self.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
                loss = self.recipe.objective.loss(self.model, example.to(self.device)) / tokens
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        if not math.isfinite(total) or not bool(torch.isfinite(norm)):
            raise QkvError(
                f"the {'loss' if not math.isfinite(total) else 'gradient'} stopped being a number at step "
                f"{self.step + 1}: lower optimizer.lr or lengthen its warm-up; {self.kept()}"
            )
        factor = self.recipe.optimizer.schedule.factor(self.step + 1, self.settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.optimizer.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for module in self.model.modules():
            after_step = getattr(module, "after_step", None)  # of a router that balances itself
            if after_step is not None:
                after_step()
        self.step += 1
        return total

    def kept(self) -> str:
        return f"the last checkpoint is {self.run.folder / self.run.last}" if self.run.last else "nothing was saved yet"

    # --- the loop ---

    def train(self) -> Run:
        """Train to the end; `Stopped` after a signal or the time limit."""
        with self.run.claimed():
            return self.trained()

    def trained(self) -> Run:
        settings, self.model = self.settings, self.model.train()
        if self.run.begun:
            self.run.forget_after(self.step)
        board = Board(self.run.folder / BOARD, self.step)
        began, spent, window = time.monotonic(), self.seconds, self.window
        with Watch(settings.steps, self.step) as watch, listening() as asked:
            while self.step < settings.steps and not self.enough:
                clock = time.perf_counter()
                examples = [self.examples.next() for _ in range(settings.accumulate)]
                window["loss"] += self.learn(examples)
                window["tokens"] += sum(example.tokens for example in examples)
                window["steps"] += 1
                window["seconds"] += time.perf_counter() - clock
                self.seconds = spent + time.monotonic() - began
                if self.step % settings.log_every == 0 or self.step == settings.steps:
                    self.report(window, watch, board)
                    window |= NOTHING
                last = self.step == settings.steps
                better = False
                if self.recipe.data.valid is not None and (last or self.step % settings.evaluate_every == 0):
                    better = self.judge(watch, board)
                last = last or self.enough
                if self.step == 1 and self.examples.training.skipped:
                    skipped, most = self.examples.training.skipped, self.recipe.data.longest
                    many = f"{skipped:,} training examples are" if skipped > 1 else "1 training example is"
                    watch.say(f"{many} longer than max_tokens = {most} and left out")
                late = settings.minutes is not None and time.monotonic() - began > 60 * settings.minutes
                if better or last or late or asked or self.step % settings.save_every == 0:
                    self.run.save(self.model, self.moment(), best=better)
                if (late or asked) and not last:
                    code = 128 + asked[0] if asked else 0
                    raise Stopped(
                        f"stopped at step {self.step:,} of {settings.steps:,} and saved; "
                        f"go on with: qkv train --resume {self.run.folder}", code,
                    )  # fmt: skip
            if self.enough:
                watch.say(f"no better score in {self.worse} evaluations: done at step {self.step:,}")
        board.close()
        return self.run

    @property
    def enough(self) -> bool:
        """Whether the score has not got better for as long as it may."""
        return self.settings.patience is not None and self.worse >= self.settings.patience

    def report(self, window: dict[str, float], watch: Watch, board: Board) -> None:
        values = {
            "loss": window["loss"] / window["steps"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "tokens_per_second": window["tokens"] / window["seconds"],
        }
        watch.step(self.step, values)
        board.add(self.step, "train", values)
        self.run.log({"step": self.step, "split": "train", "seconds": round(self.seconds, 1), **values})

    def judge(self, watch: Watch, board: Board) -> bool:
        """Evaluate on the validation set → whether it was the best so far."""
        valid = self.recipe.data.valid
        assert valid is not None
        examples = self.recipe.evaluation.examples
        scores: Scores = evaluate(self.task, self.recipe, valid, self.run.base, examples=examples, read=self.examples)
        metric = self.recipe.evaluation.metric
        names = [name for name in scores.values if name not in ("loss", "perplexity")] or ["loss"]
        value = scores.values[names[0]]
        better = self.best is None or (value > self.best if metric.higher else value < self.best)
        self.best, self.worse = (value, 0) if better else (self.best, self.worse + 1)
        watch.say(f"step {self.step:,}  " + "  ".join(f"{name} {x:.3f}" for name, x in scores.values.items()))
        board.add(self.step, "valid", scores.values)
        self.run.log({"step": self.step, "split": "valid", "seconds": round(self.seconds, 1), **scores.values})
        return better


def device_of(name: str) -> torch.device:
    """`auto` is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as fault:
        raise QkvError(f"train.device={name!r} cannot be used here ({str(fault).splitlines()[0]}): take auto") from None


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Collects Ctrl-C and a polite kill until the block ends, so that a step is never cut; a second one is not kept."""
    asked: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, hear)
    except ValueError:
        pass  # not in the main thread: signals are not ours to hear
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
