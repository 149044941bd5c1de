"""What a person and a program see of training: a bar on stderr, lines in metrics.jsonl, TensorBoard."""

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Watch:
    """A progress bar where stderr is a terminal, else a line now and then."""

    def __init__(self, steps: int, done: int) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self.steps, self.said = steps, 0.0
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(compact=True), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=steps, completed=done, state="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show where training is."""
        state = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tok/s"
        self.bar.update(self.task, completed=step, state=state)
        if self.bar.disable and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            self.say(f"step {step:,} of {self.steps:,}  {state}")

    def say(self, text: str) -> None:
        """A line of its own above the bar."""
        self.console.print(text, markup=False)


class Board:
    """TensorBoard, where it is installed."""

    def __init__(self, folder: Path, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.writer = None
        else:
            self.writer = SummaryWriter(str(folder), purge_step=after + 1)

    def add(self, step: int, split: str, values: dict[str, Any]) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
