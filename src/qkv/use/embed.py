"""Texts as vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.parts.head import OutputModule, Pool, Vector
from qkv.use.task import Task


@torch.inference_mode()
def embed(task: Task, texts: Sequence[str], *, batch: int = 32, cut: bool = False) -> Tensor:
    """A vector for each text, N C in fp32: by the model's own pooling, else the mean over its tokens, of length 1.

    A text longer than the model reads is an error, or with `cut` is cut off. Texts of like length are computed
    together, so that little goes to padding. A decoder's vectors see the text up to each token only.
    """
    if task.pairs:
        raise QkvError("an encoder-decoder has no vector of a text; take an encoder, such as all-minilm-l6-v2")
    if batch < 1:
        raise QkvError(f"a batch holds at least 1 text, not {batch}")
    model, own = task.model, task.model.head
    head: OutputModule = (
        own if own is not None and isinstance(own.spec, Vector) else Vector(Pool("mean")).build(0, torch.empty(0))
    )
    before, after = task.frame
    most = task.room - len(before) - len(after) if cut and task.room is not None else None
    ids = [task.fit([*before, *row[:most], *after], n) for n, row in enumerate(task.ids_of(texts), 1)]
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    vectors: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        padded, lengths = task.batch([ids[row] for row in rows])
        with model.evaluating():
            x = model.hidden(padded, lengths=lengths)
            valid = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            vectors.update(zip(rows, head(x, model.wiring.embed.table, valid).float().cpu(), strict=True))
    return torch.stack([vectors[n] for n in range(len(ids))]) if ids else torch.empty(0, 0)
