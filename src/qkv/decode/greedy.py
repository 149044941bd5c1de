"""One token at a time."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from qkv.decode.rules import NEVER, Past
from qkv.decode.search import Hypothesis, Move, Search, Steps
from qkv.ops.sample import blocked
from qkv.spec import part


class OneByOne(Search):
    """Searches that follow a single path in each row; they differ in how the next token is chosen."""

    @abstractmethod
    def chooser(self, seeds: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (scores: B V, rows: B, numbers of the rows) → ids B; a shift of all scores changes nothing."""

    def run(
        self, logits: Tensor, past: Past, limits: Sequence[int], ends: Collection[int], seeds: Sequence[int]
    ) -> Steps:
        choose, alive = self.chooser(seeds), torch.arange(len(limits))
        ids: list[list[int]] = [[] for _ in limits]
        log_p, ended = [0.0] * len(limits), [False] * len(limits)
        while True:
            scores = past.ruled(logits)
            chosen = choose(scores, alive)
            score = scores.gather(1, chosen[:, None])[:, 0]
            gained = logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)
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
            logits = yield Move(keep, chosen)


@part("greedy")
class Greedy(OneByOne):
    """The likeliest token, each time."""

    def chooser(self, seeds: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda scores, rows: blocked.argmax(scores)
