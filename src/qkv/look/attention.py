"""What a trained model attends to while it reads and writes one text."""

import dataclasses as dc

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.models import EncoderDecoderModel, SequenceModel
from qkv.parts.stack import StackModule
from qkv.use import Prediction, Task


@dc.dataclass(frozen=True)
class Attended:
    """One kind of attention over one text: weights L H T S of all layers, with the tokens of its rows and columns."""

    kind: str
    """`encoder`, `decoder`, `cross` or `self`."""
    rows: list[str]
    """The T tokens that look."""
    columns: list[str]
    """The S tokens that are looked at."""
    weights: Tensor
    layers: list[str]
    """The path of each layer's branch, such as `decoder.0.cross`."""


def attend(task: Task, text: str, answer: Prediction | None = None) -> list[Attended]:
    """Every attention of a model over a text, and over the answer that it gave, if it gave one.

    The row of a decoder is named by the token that it writes, for that is what it looks for.
    """
    model, tap = task.model.eval(), Tap("**.weights")
    ids = task.encode(text)
    source = task.source.pieces(ids)
    with torch.inference_mode():
        if isinstance(model, SequenceModel):
            model.hidden(torch.tensor([ids], device=model.device), tap=tap)
            return stacked(tap, {"self": (paths(model.stack, "stack", over=False), source, source)})
        assert isinstance(model, EncoderDecoderModel)
        memory = model.encode(torch.tensor([ids], device=model.device), tap=tap)
        looks = {"encoder": (paths(model.encoder, "encoder", over=False), source, source)}
        if answer is not None:
            read = [*task.begin, *answer.ids]
            written = task.target.pieces([*read[1:], task.target.end])
            model.hidden(torch.tensor([read], device=model.device), tap=tap, **memory)
            looks["cross"] = (paths(model.decoder, "decoder", over=True), written, source)
            looks["decoder"] = (paths(model.decoder, "decoder", over=False), written, task.target.pieces(read))
    return stacked(tap, looks)


def paths(stack: StackModule, name: str, *, over: bool) -> list[str]:
    """The branches of a stack, layer by layer, that read a memory, or those that do not."""
    return [
        f"{name}.{n}.{branch}"
        for n in range(len(stack.use))
        for branch, body in stack.layer(n).bodies()
        if (getattr(body.spec, "over", None) is not None) == over
    ]


def stacked(tap: Tap, looks: dict[str, tuple[list[str], list[str], list[str]]]) -> list[Attended]:
    """What the tap kept of these branches, layer upon layer."""
    found: list[Attended] = []
    for kind, (branches, rows, columns) in looks.items():
        kept = {
            branch: weights[0].float().cpu()
            for branch in branches
            for weights in tap.find(f"{branch}.weights").values()
        }
        if kept:
            found.append(Attended(kind, rows, columns, torch.stack(list(kept.values())), list(kept)))
    return found
