"""What a trained model attends to, or recalls, while it reads and writes one text."""

import dataclasses as dc

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.models import EncoderDecoderModel, SequenceModel
from qkv.parts.mixers.recurrence import Recurrence
from qkv.parts.stack import StackModule
from qkv.use import Prediction, Task


@dc.dataclass(frozen=True)
class Attended:
    """One kind of attention over one text: weights L H T S of all layers, with the tokens of its rows and columns."""

    kind: str
    """`encoder`, `decoder`, `cross` or `self`; `self-memory` and so on where a memory is read and not the tokens."""
    rows: list[str]
    """The T tokens that look."""
    columns: list[str]
    """The S tokens that are looked at."""
    weights: Tensor
    layers: list[str]
    """The path of each layer's branch, such as `decoder.0.cross`."""
    measure: str = "attention weight"
    """What the weights are."""

    @property
    def numbers(self) -> list[int]:
        """The number of each layer in its stack, from 1: a hybrid's other layers look in another way."""
        return [int(path.split(".")[1]) + 1 for path in self.layers]


@dc.dataclass(frozen=True)
class Look:
    """Branches that look alike, and the tokens of the rows and columns of their weights."""

    kind: str
    branches: list[str]
    rows: list[str]
    columns: list[str]
    memory: bool = False


@dc.dataclass(frozen=True)
class Watched:
    """The tokens of the passes that a tap saw."""

    source: list[str]
    """What was read: the text, or its source side."""
    fed: list[str]
    """What a decoder beside an encoder was fed, if there was an answer,"""
    written: list[str]
    """and what it wrote at each of these."""


def watch(task: Task, text: str, answer: Prediction | None, tap: Tap) -> Watched:
    """Run a model over a text, and over the answer that it gave, if it gave one."""
    model, ids = task.model, task.encode(text)
    source, inputs = task.source.pieces(ids), torch.tensor([ids], device=task.model.device)
    with torch.inference_mode(), model.evaluating():
        if isinstance(model, SequenceModel):
            model.hidden(inputs, tap=tap)
            return Watched(source, [], [])
        assert isinstance(model, EncoderDecoderModel)
        memory = model.encode(inputs, tap=tap)
        if answer is None:
            return Watched(source, [], [])
        fed = [*task.begin, *answer.ids]
        model.hidden(torch.tensor([fed], device=model.device), tap=tap, **memory)
    return Watched(source, task.target.pieces(fed), task.target.pieces([*fed[1:], task.target.end]))


def attend(task: Task, text: str, answer: Prediction | None = None) -> list[Attended]:
    """Every attention of a model over a text, and over the answer that it gave, if it gave one.

    The row of a decoder is named by the token that it writes, for that is what it looks for. What is read of a memory
    is a sum of values too, whose weights have either sign: each row is shown as the shares |w| / Σ |w|.
    """
    model, tap = task.model, Tap("**.weights")
    seen = watch(task, text, answer, tap)
    if isinstance(model, SequenceModel):
        return stacked(tap, own(model.stack, "stack", "self", seen.source, seen.source))
    assert isinstance(model, EncoderDecoderModel)
    looks = own(model.encoder, "encoder", "encoder", seen.source, seen.source)
    if answer is not None:
        looks += [Look("cross", paths(model.decoder, "decoder", over=True), seen.written, seen.source)]
        looks += own(model.decoder, "decoder", "decoder", seen.written, seen.fed)
    return stacked(tap, looks)


def own(stack: StackModule, name: str, kind: str, rows: list[str], columns: list[str]) -> list[Look]:
    """How a stack looks at its own tokens."""
    held = paths(stack, name, over=False, memory=True)
    seen = [path for path in paths(stack, name, over=False) if path not in held]
    return [Look(kind, seen, rows, columns), Look(f"{kind}-memory", held, rows, columns, memory=True)]


def paths(stack: StackModule, name: str, *, over: bool, memory: bool = False) -> list[str]:
    """The branches of a stack, layer by layer, that read another's tokens, or those that do not; or the recurrences."""
    return [
        f"{name}.{n}.{branch}"
        for n in range(len(stack.use))
        for branch, body in stack.layer(n).bodies()
        if (getattr(body.spec, "over", None) is not None) == over and (isinstance(body, Recurrence) or not memory)
    ]


def stacked(tap: Tap, looks: list[Look]) -> list[Attended]:
    """What the tap kept of these branches, layer upon layer."""
    found: list[Attended] = []
    for look in looks:
        kept = {
            branch: weights[0].float().cpu()
            for branch in look.branches
            for weights in tap.find(f"{branch}.weights").values()
        }
        if kept:
            weights, measure = torch.stack(list(kept.values())), Attended.measure
            if look.memory:
                weights, measure = shares(weights), "|weight| / Σ |weight|"
            found.append(Attended(look.kind, look.rows, look.columns, weights, list(kept), measure))
    return found


def shares(weights: Tensor) -> Tensor:
    """|w| / Σ |w| of each row; a row that reads nothing stays zero."""
    size = weights.abs()
    return size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
