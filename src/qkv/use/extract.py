"""What a model finds in a text: the class of each token, or the answer to a question."""

import dataclasses as dc

import torch

from qkv.data import Encoded
from qkv.errors import QkvError
from qkv.parts.head import Span, Tagger
from qkv.use.task import Prediction, Task


@dc.dataclass(frozen=True)
class Tag:
    """A token as it stands in a text, from character `start` to `end`, its likeliest class, and log p of that."""

    text: str
    label: str
    score: float
    start: int
    end: int


def tag(task: Task, text: str) -> list[Tag]:
    """The class of each token of a text."""
    head = task.model.head
    if head is None or not isinstance(head.spec, Tagger):
        raise QkvError("only a model whose head classifies tokens tags a text; `qkv inspect` shows what it has")
    read = task.source.prompt(text)
    scores, classes = per_token(task, read).log_softmax(-1).max(-1)
    found = zip(read.offsets, read.specials, scores.tolist(), classes.tolist(), strict=True)
    return [
        Tag(text[start:end], head.spec.labels[label], score, start, end)
        for (start, end), special, score, label in found
        if not special
    ]


def extract(task: Task, question: str, context: str) -> Prediction:
    """The stretch of the context that best answers a question: the likeliest first and last token, in this order.

    Its score is log p(first) + log p(last), each over the tokens of the context.
    """
    if task.model.head is None or not isinstance(task.model.head.spec, Span):
        raise QkvError("only a model whose head finds where an answer begins and ends extracts one from a text")
    read, asked = task.source.prompt(question, context), task.source.prompt(question).specials.count(False)
    inside = [n for n, special in enumerate(read.specials) if not special][asked:]
    if not inside:
        raise QkvError("the context is empty: there is nothing to find an answer in")
    start, end = per_token(task, read)[inside].log_softmax(0).unbind(-1)
    best, first = start.cummax(0)  # for each last token the best first one before it
    last = int((best + end).argmax())
    places = inside[int(first[last])], inside[last]
    (begin, _), (_, stop) = (read.offsets[n] for n in places)
    return Prediction(context[begin:stop], float((best + end)[last]), read.ids[places[0] : places[1] + 1])


def per_token(task: Task, read: Encoded) -> torch.Tensor:
    """What the head says of each token: T labels."""
    given = {"segments": torch.tensor([read.segments], device=task.model.device)}
    return task.judged([task.fit(read.ids)], **(given if any(read.segments) else {}))[0]
