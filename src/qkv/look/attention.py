"""What a trained model attends to while it reads and writes one text."""

import dataclasses as dc

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.models import EncoderDecoderModel, SequenceModel
from qkv.train import Prediction, Task


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
    source = task.source.tokens(ids)
    with torch.inference_mode():
        if isinstance(model, SequenceModel):
            model.hidden(torch.tensor([ids], device=model.device), tap=tap)
            return gather(tap, {"stack": ("self", source, source)})
        assert isinstance(model, EncoderDecoderModel)
        memory = model.encode(torch.tensor([ids], device=model.device), tap=tap)
        names = {"encoder": ("encoder", source, source)}
        if answer is not None:
            read = [task.target.begin, *answer.ids]
            written = task.target.tokens([*answer.ids, task.target.end])
            model.hidden(torch.tensor([read], device=model.device), tap=tap, **memory)
            names["cross"] = ("cross", written, source)
            names["decoder"] = ("decoder", written, task.target.tokens(read))
    return gather(tap, names)


def gather(tap: Tap, names: dict[str, tuple[str, list[str], list[str]]]) -> list[Attended]:
    """Stack what the tap kept, layer upon layer: memories are read by as many columns as the source has."""
    found: list[Attended] = []
    for stack, (kind, rows, columns) in names.items():
        prefix = "decoder" if stack == "cross" else stack
        kept = {
            path.removesuffix(".weights"): weights[0].float().cpu()
            for path, weights in tap.find(f"{prefix}.**.weights").items()
            if weights.shape[-2:] == (len(rows), len(columns)) and (stack == "cross") == path.endswith("cross.weights")
        }
        if kept:
            found.append(Attended(kind, rows, columns, torch.stack(list(kept.values())), list(kept)))
    return found
