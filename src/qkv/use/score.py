"""How well a decoder predicts a text."""

import dataclasses as dc
import math

import torch

from qkv.errors import QkvError
from qkv.use.task import Task


@dc.dataclass(frozen=True)
class Score:
    """Σ −log p over the tokens of a text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(nats / token)."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """What the text would take, compressed by this model; comparable between vocabularies."""
        return self.nats / math.log(2) / self.bytes


@torch.inference_mode()
def score(task: Task, text: str, *, context: int | None = None, stride: int | None = None) -> Score:
    """Perplexity in windows of `context` tokens, each `stride` further, of which only the new tokens count.

    A small stride gives each token more of what stands before it, and takes context / stride times as long; by default
    half of the context. Every window begins as the model's texts do; the first token of the text is not scored unless
    something stands before it.
    """
    if not task.continues:
        raise QkvError("only a decoder has a perplexity: it predicts each token from those before it")
    model, (before, _) = task.model, task.frame
    ids = task.ids(text)
    context = min(task.room or 1024, 1024) if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if context < len(before) + 2:
        raise QkvError(f"a context of {context} predicts nothing: it has room for {len(before) + 2} tokens at least")
    if not 1 <= stride <= context:
        raise QkvError(f"a stride lies between 1 and the context, {context}; it is {stride}")
    if task.room is not None and context > task.room:
        raise QkvError(f"a context of {context} is more than the model's {task.room} positions")
    if len(ids) < (1 if before else 2):
        raise QkvError(f"the text has {len(ids)} tokens: nothing stands before any of them to predict it from")
    nats, done, size = 0.0, 0 if before else 1, context - len(before)
    stride = min(stride, size if before else size - 1)  # something stands before the first new token of a window
    while done < len(ids):
        end = min(len(ids), size if done <= 1 else done + stride)
        window = [*before, *ids[max(0, end - size) : end]]
        new = min(end - done, len(window) - 1)
        with model.evaluating():
            x = model.hidden(torch.tensor([window[:-1]], device=model.device))[0, -new:]
            nats += float(model.loss(x, torch.tensor(window[-new:], device=model.device)))
        done = end
    return Score(nats, len(ids) - (0 if before else 1), len(text.encode()))
