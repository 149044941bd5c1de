"""The folder of one training run: recipe, tokenizers, metrics, checkpoints."""

import dataclasses as dc
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkv.checkpoints.load import load_published
from qkv.checkpoints.opening import not_packed, opened
from qkv.checkpoints.pull import resolve
from qkv.checkpoints.weights import SPEC, load_model, load_tensors, read_json, save_model, save_tensors
from qkv.checkpoints.whole import locked, make_folder, whole_folder, write_text
from qkv.data import Tokenizers
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.blocks.packed import Packed
from qkv.spec import dump, nearest
from qkv.spec import load as load_spec
from qkv.train.recipe import Recipe
from qkv.use import Manner, Task, open_published

RUN, METRICS, TRAINER, SIZES, BOARD = "run.json", "metrics.jsonl", "trainer", "sizes.json", "tensorboard"
TOKENIZERS = ("tokenizer.json", "target_tokenizer.json")


@dc.dataclass
class Moment:
    """All that training needs to go on as if it had never stopped, besides the model."""

    step: int
    tensors: dict[str, Tensor]
    """The optimiser's, and the states of the random generators."""
    values: dict[str, Any]
    """The position in the data, the best score, the time spent."""


class Run:
    """A run folder. Checkpoints appear whole: a folder is renamed into place, then run.json is made to point at it.

    run.json            recipe, the recipe's folder, and which checkpoints are last and best
    tokenizer.json      and target_tokenizer.json, where the target has its own
    metrics.jsonl       a line for each logged step and evaluation
    step-00001000/      spec.json, model.safetensors, trainer.json, trainer.safetensors
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / RUN).is_file():
            raise QkvError(f"{folder} is no run: it has no {RUN}; `qkv train RECIPE` makes one")
        facts = read_json(folder / RUN)
        if not isinstance(facts, dict) or not facts.keys() >= {"recipe", "base", "last", "best"}:
            raise QkvError(f"{folder / RUN} does not say what a run is made of: it is damaged, or not qkv's")
        self.base = Path(facts["base"])
        self.last: str | None = facts["last"]
        self.best: str | None = facts["best"]
        self.recipe: Recipe = load_spec(facts["recipe"], Recipe, str(folder / RUN))
        self.tokenizers = Tokenizers.load(folder, self.recipe.data.target_tokenizer is None)

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, base: Path, tokenizers: Tokenizers) -> "Run":
        """Start a run in a folder that holds none."""
        refuse_taken(folder)
        make_folder(folder)
        try:
            tokenizers.save(folder)
            facts = {"recipe": dump(recipe), "base": str(base.resolve()), "last": None, "best": None}
            write_text(folder / RUN, json.dumps(facts, indent=2, ensure_ascii=False))
            return cls(folder)
        except BaseException:
            discard(folder)
            raise

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on from, or to look at."""
        return self.last is not None or (self.folder / METRICS).exists()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """No other process trains it meanwhile; what one that was killed left half written is gone."""
        with locked(self.folder) as free:
            if not free:
                raise QkvError(f"another process trains {self.folder} at this moment: wait for its end, or stop it")
            for left in self.folder.glob(".step-*.part"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    # --- checkpoints ---

    def save(self, model: Module, moment: Moment, *, best: bool) -> None:
        """Add a checkpoint, and drop those that are neither last nor best any more."""
        name = f"step-{moment.step:08d}"
        with whole_folder(self.folder / name) as part:
            save_model(model, part)
            save_tensors(moment.tensors, part / f"{TRAINER}.safetensors")
            write_text(part / f"{TRAINER}.json", json.dumps({"step": moment.step, **moment.values}))
            sizes = {file.name: file.stat().st_size for file in sorted(part.iterdir())}
            write_text(part / SIZES, json.dumps(sizes))
        self.last, self.best = name, name if best else self.best
        self.point()
        for folder in self.folder.glob("step-*"):
            if folder.name not in (self.last, self.best):
                shutil.rmtree(folder, ignore_errors=True)

    def point(self) -> None:
        facts = read_json(self.folder / RUN)
        write_text(self.folder / RUN, json.dumps({**facts, "last": self.last, "best": self.best}, indent=2))

    def checkpoint(self, name: str | None) -> Path:
        """The folder of a checkpoint, seen to be complete."""
        if name is None:
            raise QkvError(f"{self.folder} has no checkpoint yet: `qkv train --resume {self.folder}` makes one")
        folder = self.folder / name
        sizes = read_json(folder / SIZES)
        for file, size in sizes.items():
            found = (folder / file).stat().st_size if (folder / file).exists() else None
            if found != size:
                state = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
                raise QkvError(f"{folder / file} {state}: the run is incomplete, copy it again")
        return folder

    def model(self, *, last: bool = False) -> Module:
        """The best model so far, or the last."""
        return load_model(self.checkpoint(self.last if last or self.best is None else self.best))

    def moment(self) -> Moment:
        """Where training stopped."""
        folder = self.checkpoint(self.last)
        values = read_json(folder / f"{TRAINER}.json")
        return Moment(values.pop("step"), load_tensors(folder / f"{TRAINER}.safetensors"), values)

    # --- metrics ---

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; one that a crash cut off is left out."""
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, values: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with (self.folder / METRICS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop what was logged after a step that training goes back to."""
        kept: Sequence[dict[str, Any]] = [line for line in self.metrics() if line["step"] <= step]
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def refuse_taken(folder: Path) -> None:
    """Refuse a folder that holds a run, or what a run would write over."""
    if (folder / RUN).exists():
        raise QkvError(f"{folder} holds a run already: `qkv train --resume {folder}` continues it, or name another")
    for name in (*TOKENIZERS, METRICS, BOARD):
        if (folder / name).exists():
            raise QkvError(
                f"{folder} holds {name} of something else, which a run would write over: name another folder"
            )


def discard(folder: Path) -> None:
    """Take back a run that cannot begin; what else stands in its folder stays."""
    for name in (RUN, *TOKENIZERS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / BOARD, ignore_errors=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def load(name: str | Path, dtype: torch.dtype | str | None = None, *, packed: bool = False) -> Module:
    """A model, in evaluation mode: a run (its best checkpoint), the folder of one, or what others published.

    `name` is a path, a name that `qkv pull` knows, or `hf:owner/name`. Weights are in `dtype`, or as the file has them.
    `packed` leaves those of a .gguf file in their blocks, mapped from the file, and computes in `dtype`; a directory
    that `qkv convert --quantize` wrote is loaded so without asking.
    """
    path = resolve(name)
    kind = dtype_of(dtype)
    if (path / RUN).is_file() or (path / SPEC).is_file():
        return own(path, Run(path).model() if (path / RUN).is_file() else load_model(path), kind, packed)
    return load_published(opened(path, kind, packed=packed), kind)


def own(path: Path, model: Module, dtype: torch.dtype | None, packed: bool) -> Module:
    """A model in qkv's own form, in another dtype if need be."""
    if packed and not any(isinstance(weight, Packed) for weight in model.parameters()):
        raise not_packed(path)
    return model if dtype is None else model.to(dtype)


def open_task(
    name: str | Path, dtype: torch.dtype | str | None = None, *, last: bool = False, packed: bool = False
) -> Task:
    """A model with its tokenizer, ready to use; the rest as for `load`. Of a run its best model, or its last."""
    path, kind = resolve(name), dtype_of(dtype)
    if (path / RUN).is_file():
        run = Run(path)
        model = own(path, run.model(last=last), kind, packed)
        return Task(model, run.tokenizers, Manner(run.recipe.evaluation.search))
    if last:
        raise QkvError(f"{path} is no run, which alone has a last checkpoint beside its best")
    if (path / SPEC).is_file():
        if not (path / "tokenizer.json").is_file():
            raise QkvError(f"{path} is a checkpoint without a tokenizer: name the run that it is a part of")
        joint = not (path / "target_tokenizer.json").is_file()
        return Task(load(path, kind, packed=packed), Tokenizers.load(path, joint))
    return open_published(path, kind, packed=packed)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(name, str) and name not in DTYPES:
        raise QkvError(f"no dtype is called {name!r}{nearest(name, DTYPES)}")
    return DTYPES[name] if isinstance(name, str) else name
