"""A text in the making, as who asked for it sees it, and as the engine that makes it does."""

import dataclasses as dc
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qkv.decode.greedy import OneByOne
from qkv.decode.rules import Past
from qkv.decode.search import Hypothesis, Search, Steps
from qkv.errors import QkvError
from qkv.ops.sample import Scores
from qkv.state import State


class Engine(Protocol):
    """Where requests are served."""

    news: threading.Condition

    def wait(self, request: "Request", tokens: int) -> bool:
        """Wait until a request has more than so many tokens, or has ended → whether it goes on."""


class Request:
    """A text in the making. Iterating gives its tokens as they come; those of a beam come together, at its end.

    Who waits for it steps the engine, unless another thread is at it. What went wrong is raised where it is waited for.
    """

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self.done = False
        self.error: Exception | None = None
        self.hypotheses: list[Hypothesis] = []

    def __iter__(self) -> Iterator[int]:
        given = 0
        while self.engine.wait(self, given) or given < len(self.tokens):
            yield self.tokens[given]
            given += 1
        if self.error is not None:
            raise self.error

    def result(self) -> list[Hypothesis]:
        """The best hypotheses, best first, as `decode` gives them for this text alone."""
        while self.engine.wait(self, len(self.tokens)):
            pass
        if self.error is not None:
            raise self.error
        return self.hypotheses

    def cancel(self) -> None:
        """Give it up; its rows are let go at the next step."""
        self.finish(error=QkvError("the request was cancelled"))

    def grow(self, tokens: Sequence[int]) -> None:
        with self.engine.news:
            if not self.done:
                self.tokens += tokens

    def finish(self, found: Sequence[Hypothesis] = (), error: Exception | None = None) -> None:
        """What comes first counts: the end, a failure, or that it was cancelled."""
        with self.engine.news:
            if not self.done:
                self.tokens += found[0].ids[len(self.tokens) :] if found else []
                self.hypotheses, self.error, self.done = list(found), error, True
                self.engine.news.notify_all()


@dc.dataclass(eq=False)
class Job:
    """A request as its engine sees it."""

    request: Request
    ids: list[int]
    search: Search
    limit: int
    ends: Collection[int]
    seed: int
    given: dict[str, Tensor]
    read: int = 0
    """How many tokens of its text have been fed."""
    state: State | None = None
    """While the prompt is read; afterwards its rows stand in the state of all."""
    steps: Steps | None = None
    rows: int = 1
    parents: list[int] | None = None
    """Which of its rows go on, in this order; None is all, as they stand."""
    tokens: Tensor = dc.field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """What they are fed next."""

    @property
    def need(self) -> int:
        """So many tokens are fed at most: the last new one is not."""
        return len(self.ids) + self.limit - 1

    @property
    def follows(self) -> bool:
        """Whether its text is settled token by token."""
        return isinstance(self.search, OneByOne)

    def choose(self, logits: Scores) -> None:
        """Let the search go on; what it raises is its own request's."""
        try:
            if self.steps is None:
                past = Past(self.search.rules, [self.ids], [self.limit], self.ends, logits.x.device)
                self.steps = self.search.run(logits, past, [self.limit], self.ends, [self.seed])
                move = next(self.steps)
            else:
                move = self.steps.send(logits)
            self.parents, self.tokens = None if move.parents is None else move.parents.tolist(), move.tokens
            if self.follows:
                self.request.grow(move.tokens.tolist())
        except StopIteration as end:
            self.request.finish(end.value[0])
        except Exception as error:
            self.request.finish(error=error)
