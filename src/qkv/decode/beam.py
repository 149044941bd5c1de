"""Several paths at a time."""

import dataclasses as dc
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qkv.decode.rules import NEVER, Past
from qkv.decode.search import Hypothesis, Move, Search, Steps
from qkv.errors import QkvError
from qkv.ops.sample import Scores
from qkv.spec import part


@part("beam")
class Beam(Search):
    """Keep the `size` likeliest unfinished paths of each row; rank finished ones by log p(y) / |y|^α.

    |y| counts the end token; α is `length_penalty`: 0 prefers short texts, above 1 long ones (Wu 2016 discusses
    the forms). A row is done when no unfinished path, ended now, would rank among its `size` finished ones; with
    `early_stopping`, as soon as there are so many.
    """

    size: int = 4
    length_penalty: float = 1.0
    n_best: int = 1
    early_stopping: bool = False

    def check(self) -> None:
        if self.size < 1:
            raise QkvError(f"a beam keeps at least 1 path, not {self.size}")
        if not -10 <= self.length_penalty <= 10:
            raise QkvError(f"the length penalty lies between −10 and 10, not at {self.length_penalty}")
        if not 1 <= self.n_best <= self.size:
            raise QkvError(f"a beam of {self.size} gives 1 to {self.size} hypotheses, not {self.n_best}")

    @property
    def paths(self) -> int:
        return self.size

    def run(
        self, logits: Scores, past: Past, limits: Sequence[int], ends: Collection[int], seeds: Sequence[int]
    ) -> Steps:
        k, device = self.size, logits.x.device
        wide = k * (1 + max(1, len(ends)))  # of so many extensions k do not end
        beams = [_Row(limit, self) for limit in limits]
        live = list(beams)
        total = torch.zeros(len(beams), 1, device=device)  # at first a row has one path, the empty one
        while True:
            best, path, token = extensions(logits, past, total, wide)
            choices = zip(best.tolist(), path.tolist(), token.tolist(), strict=True)
            steps = [beam.extend(*choice, ends) for beam, choice in zip(live, choices, strict=True)]
            going = [(n, step) for n, step in enumerate(steps) if step is not None]
            if not going:
                return [beam.best(self.n_best) for beam in beams]
            paths = total.shape[1]
            parents = torch.tensor([n * paths + parent for n, step in going for parent in step.parents], device=device)
            tokens = torch.tensor([token for _, step in going for token in step.tokens], device=device)
            total = torch.tensor([step.totals for _, step in going], device=device)
            past.select(parents)
            past.feed(tokens)
            del logits
            logits = yield Move(parents, tokens)
            live = [live[n] for n, _ in going]


def extensions(logits: Scores, past: Past, total: Tensor, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest extensions of each row: their Σ log p, best first, the paths they extend, and by which tokens.

    `total` (B k) is Σ log p of the paths whose scores `logits` (B·k V) are; of each only the `wide` likeliest tokens
    may be among the row's. Without rules log p is made for these alone.
    """
    if past.rules:
        log_p, ids = past.ruled(logits.changed(logits.log_p())).largest(min(wide, logits.x.shape[1]))
    else:
        _, ids = logits.largest(min(wide, logits.x.shape[1]))
        log_p = logits.log_p_of(ids)
    scores = (total.view(-1, 1) + log_p).view(len(total), -1)
    best, at = scores.topk(min(wide, scores.shape[1]), 1)
    return best, at // log_p.shape[1], ids.view(len(total), -1).gather(1, at)


@dc.dataclass(frozen=True)
class _Step:
    """How the k unfinished paths of a row go on."""

    parents: list[int]
    tokens: list[int]
    totals: list[float]


class _Row:
    """The paths of one row."""

    def __init__(self, limit: int, spec: Beam) -> None:
        self.limit, self.spec = limit, spec
        self.paths: list[list[int]] = [[]] * spec.size
        self.total = 0.0
        self.finished: list[Hypothesis] = []

    def rank(self, log_p: float, length: int) -> float:
        return log_p / length**self.spec.length_penalty

    def finish(self, ids: list[int], log_p: float, ended: bool) -> None:
        """Keep the `size` best finished paths."""
        score = self.rank(log_p, max(1, len(ids) + ended))
        self.finished.append(Hypothesis(ids, log_p, score, ended))
        self.finished = self.best(self.spec.size)

    def best(self, n: int) -> list[Hypothesis]:
        return sorted(self.finished, key=lambda hypothesis: -hypothesis.score)[:n]

    def extend(self, totals: list[float], paths: list[int], tokens: list[int], ends: Collection[int]) -> _Step | None:
        """Take the likeliest extensions, best first → how to go on, or None when the row is done."""
        k, step = self.spec.size, _Step([], [], [])
        for rank, (total, path, token) in enumerate(zip(totals, paths, tokens, strict=True)):
            if total == NEVER:
                break
            if token in ends:
                if rank < k:
                    self.finish(self.paths[path], total, ended=True)
            elif len(step.tokens) < k:
                step.parents.append(path)
                step.tokens.append(token)
                step.totals.append(total)
        if not step.tokens:
            if not self.finished:  # the rules leave nothing to add to any path
                self.finish(self.paths[0], self.total, ended=False)
            return None
        self.total = step.totals[0]
        self.paths = [self.paths[path] + [token] for path, token in zip(step.parents, step.tokens, strict=True)]
        if len(self.paths[0]) >= self.limit:
            for ids, log_p in zip(self.paths, step.totals, strict=True):
                self.finish(ids, log_p, ended=False)
            return None
        full, best = len(self.finished) == k, self.rank(self.total, len(self.paths[0]))
        if full and (self.spec.early_stopping or best <= self.finished[-1].score):
            return None
        short = k - len(step.tokens)
        self.paths += [self.paths[0]] * short
        return _Step(
            step.parents + step.parents[:1] * short,
            step.tokens + step.tokens[:1] * short,
            step.totals + [NEVER] * short,
        )
