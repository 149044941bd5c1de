"""One token at a time."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qkv.decode.rules import NEVER, Past
from qkv.decode.search import Hypothesis, Move, Search, Steps
from qkv.ops.sample import Scores
from qkv.spec import part


class Choose(Protocol):
    """How a search chooses among the scores of what comes next."""

    def __call__(self, scores: Scores, rows: Tensor) -> Tensor:
        """Scores (B V), numbers of the rows (B) → ids B; a shift of all scores of a row changes nothing."""


class OneByOne(Search):
    """Searches that follow a single path in each row; they differ in how the next token is chosen."""

    @abstractmethod
    def chooser(self, seeds: Sequence[int]) -> Choose:
        """A function that chooses for rows with these seeds."""

    def run(
        self, logits: Scores, past: Past, limits: Sequence[int], ends: Collection[int], seeds: Sequence[int]
    ) -> Steps:
        choose, alive = self.chooser(seeds), torch.arange(len(limits))
        ids: list[list[int]] = [[] for _ in limits]
        log_p, ended = [0.0] * len(limits), [False] * len(limits)
        while True:
            scores = past.ruled(logits)
            chosen = choose(scores, alive)
            gained = logits.log_p_of(chosen[:, None])[:, 0]
            score = scores.x.gather(1, chosen[:, None])[:, 0]
            on = []
            each = zip(alive.tolist(), chosen.tolist(), gained.tolist(), score.tolist(), strict=True)
            for n, (row, token, gain, left) in enumerate(each):
                if left == NEVER:
                    continue
                log_p[row] += gain
                ended[row] = token in ends
                if not ended[row]:
                    ids[row].append(token)
                    if len(ids[row]) < limits[row]:
                        on.append(n)
            if not on:
                return [[Hypothesis(*row)] for row in zip(ids, log_p, log_p, ended, strict=True)]
            keep = None
            if len(on) < len(alive):
                keep = torch.tensor(on)
                alive, chosen = alive[keep], chosen[keep]
                past.select(keep)
            past.feed(chosen)
            del logits, scores
            logits = yield Move(keep, chosen)


@part("greedy")
class Greedy(OneByOne):
    """The likeliest token, each time."""

    def chooser(self, seeds: Sequence[int]) -> Choose:
        return lambda scores, rows: scores.argmax()
