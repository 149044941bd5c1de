"""How near a changed model stays to what it was, on English that comes with every Python."""

import dataclasses as dc
import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel
from qkv.parts.embed import Tokens
from qkv.parts.head import VocabularyHead
from qkv.use.task import Task

TOKENS, WINDOW, SECONDS = 2048, 256, 60.0
"""So many tokens are read, so many at a time, and fewer where that would take longer; one window is always read."""
ROWS = 64
"""Places whose scores over a vocabulary stand in memory at a time."""


@dc.dataclass(frozen=True)
class Reading:
    """What a model made of some texts, to be compared with what it, or another, makes of them later."""

    texts: list[list[int]]
    nats: float
    """Σ −log p over the tokens that a decoder predicted."""
    best: Tensor
    """The likeliest token at each place, where it writes."""
    vectors: Tensor
    """N C: the hidden vectors, where it only reads."""

    @property
    def tokens(self) -> int:
        return max(len(self.best), len(self.vectors))


def texts(task: Task) -> list[list[int]]:
    """Python's own documentation, as many tokens of it at a time as a model reads."""
    from pydoc_data.topics import topics

    before, after = task.frame if not task.continues else (task.frame[0], [])
    rooms = [task.room, task.model.wiring.embed.room, WINDOW]
    size = min(room for room in rooms if room is not None) - len(before) - len(after)
    ids: list[int] = []
    for name in sorted(topics):
        ids += task.ids(topics[name])
        if len(ids) >= TOKENS:
            break
    ids = ids[:TOKENS]
    return [[*before, *ids[at : at + size], *after] for at in range(0, len(ids), max(size, 1))]


@torch.inference_mode()
def read(task: Task, given: Sequence[Sequence[int]] | None = None) -> Reading:
    """What a model makes of texts, or of as much of Python's documentation as it reads in a minute."""
    model, began = task.model.eval(), time.monotonic()
    if isinstance(model, EncoderDecoderModel) and isinstance(model.spec.target, Tokens):
        raise QkvError("its target has a vocabulary of its own, in which English is no text")
    writes = isinstance(model.head, VocabularyHead) and (task.continues or task.pairs)
    done: list[list[int]] = []
    best: list[Tensor] = []
    vectors: list[Tensor] = []
    nats = 0.0
    for text in texts(task) if given is None else given:
        if given is None and done and time.monotonic() - began > SECONDS:
            break
        done.append(list(text))
        x, ids = hidden(task, text), torch.tensor(text, device=model.device)
        if not writes:
            vectors.append(x.float().cpu())
            continue
        x, labels = (x[:-1], ids[1:]) if task.continues else (x, ids)
        for some, right in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            scores = model.logits(some).float()
            best.append(scores.argmax(-1).cpu())
            nats += float(F.cross_entropy(scores, right, reduction="sum"))
    nothing = torch.empty(0)
    return Reading(done, nats, torch.cat([nothing.long(), *best]), torch.cat(vectors) if vectors else nothing)


def hidden(task: Task, text: Sequence[int]) -> Tensor:
    """T C; an encoder-decoder reads the text on both sides, on the second one token late."""
    model, ids = task.model, torch.tensor([text], device=task.model.device)
    if isinstance(model, EncoderDecoderModel):
        late = torch.cat((torch.full_like(ids[:, :1], task.begin[0]), ids[:, :-1]), 1)
        return model.hidden(late, **model.encode(ids))[0]
    return model.hidden(ids)[0]


def compared(task: Task, before: Reading, after: Reading) -> str:
    """What has changed, in a line."""
    if len(before.vectors):
        cosine = F.cosine_similarity(before.vectors, after.vectors).mean()
        said = f"hidden vectors with a mean cosine of {cosine:.5f} to those before"
    else:
        said = f"{(before.best == after.best).float().mean():.1%} of the likeliest tokens as before"
    if task.continues and len(before.best):
        first, second = (math.exp(one.nats / one.tokens) for one in (before, after))
        said = f"perplexity {second:.3f}, before {first:.3f}; {said}"
    return f"{said}; measured on {before.tokens:,} tokens of Python's documentation"
