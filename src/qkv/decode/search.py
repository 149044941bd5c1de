"""What every search does, and the rows that it steps through a model."""

import dataclasses as dc
from collections.abc import Collection, Generator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from qkv.decode.rules import Past, Rule
from qkv.errors import QkvError
from qkv.models import Memory, Module
from qkv.ops.sample import Scores
from qkv.spec import Spec


@dc.dataclass(frozen=True)
class Hypothesis:
    """One continuation of a row: its ids without the end token, Σ log p with it, and the score it is ranked by.

    Under rules log p stays the model's own, but in a beam, which adds up and ranks by what they make of it.
    """

    ids: list[int]
    log_p: float
    score: float
    ended: bool
    """Whether it ends in the end token, not at the limit."""


@dc.dataclass(frozen=True, eq=False)
class Move:
    """What a search feeds next: a token for each row that goes on, which continues the row `parents` before."""

    parents: Tensor | None
    """B; None is every row, as they stand."""
    tokens: Tensor
    """B."""


Steps: TypeAlias = Generator[Move, Scores, list[list[Hypothesis]]]
"""A search at work: it gives moves, is sent the scores of what comes next (B V), and returns each text's hypotheses."""


class Rows:
    """A batch of rows that have been fed to a model, with the scores of what comes next (B V)."""

    def __init__(
        self, model: Module, prompts: Sequence[Sequence[int]], memory: Memory | None, limits: Sequence[int],
        rules: Sequence[Rule], ends: Collection[int],
    ) -> None:  # fmt: skip
        if not prompts or not all(prompts):
            raise QkvError("a prompt needs at least one token")
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        longest = int(lengths.max())
        ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=model.device)
        self.model, self.past = model, Past(rules, prompts, limits, ends, model.device)
        room = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)) - 1
        if memory is None:
            self.state = model.new_state(len(prompts), room)
        else:
            self.state = model.new_state(len(prompts), room, **memory)
        equal = bool((lengths == longest).all())
        x = model.hidden(ids, state=self.state, lengths=None if equal else lengths.to(model.device))
        self.scores = model.choices(x[torch.arange(len(x)), lengths - 1])

    def follow(self, steps: Steps) -> list[list[Hypothesis]]:
        """Feed what a search asks for → what it finds."""
        try:
            move = next(steps)
            while True:
                if move.parents is not None:
                    self.state.select(move.parents)
                self.feed(move.tokens)
                move = steps.send(self.scores)
        except StopIteration as end:
            found: list[list[Hypothesis]] = end.value
            return found

    def feed(self, ids: Tensor) -> None:
        """One more token for each row (B)."""
        del self.scores  # so that the next ones take their place in memory; a search lets go of them too
        self.scores = self.model.choices(self.model.hidden(ids[:, None], state=self.state)[:, 0])


@dc.dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Search(Spec):
    """A way to choose tokens, and the rules that it heeds, in this order.

    Rules change the model's own scores, before a temperature; in a beam, log p. A row in which they leave no token
    stops there.
    """

    rules: tuple[Rule, ...] = ()

    @property
    def paths(self) -> int:
        """How many rows a text takes at most."""
        return 1

    def run(
        self, logits: Scores, past: Past, limits: Sequence[int], ends: Collection[int], seeds: Sequence[int]
    ) -> Steps:
        """From the scores of what follows each prompt (B V) to the best hypotheses of each text, best first.

        Text b has at most limits[b] tokens, and any of `ends` ends it.
        """
        raise AssertionError(f"{type(self).__name__} does not say how it searches")


@torch.inference_mode()
def decode(
    model: Module,
    prompts: Sequence[Sequence[int]],
    search: Search,
    *,
    limits: Sequence[int],
    ends: int | Collection[int] | None,
    memory: Memory | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Continue each prompt: best hypotheses first. A row's result does not depend on the rows beside it.

    `limits[b]` bounds the new tokens of row b; `ends` is the id that ends a row, or several, or None. An
    encoder-decoder reads `memory=model.encode(source)`. `seeds` tell sampled rows apart; by default their numbers.
    """
    if len(limits) != len(prompts) or min(limits, default=1) < 1:
        raise QkvError(f"{len(prompts)} prompts need as many limits of at least 1 token; found {list(limits)}")
    seeds = range(len(prompts)) if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise QkvError(f"{len(prompts)} prompts need as many seeds; found {list(seeds)}")
    over = several(ends)
    with model.evaluating():
        rows = Rows(model, prompts, memory, limits, search.rules, over)
        return rows.follow(search.run(rows.scores, rows.past, limits, over, seeds))


def several(ends: int | Collection[int] | None) -> Collection[int]:
    """The ids that end a text."""
    return () if ends is None else (ends,) if isinstance(ends, int) else frozenset(ends)
