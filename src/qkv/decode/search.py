"""What every search does, and the rows that it steps through a model."""

import dataclasses as dc
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from qkv.decode.rules import Past, Rule
from qkv.errors import QkvError
from qkv.models import Memory, Module
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


class Rows:
    """A batch of rows that have been fed to a model, with the scores of what comes next (`logits`, B V in fp32)."""

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
        self.logits = model.logits(x[torch.arange(len(x)), lengths - 1]).float()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.state.select(rows)
        self.past.select(rows)
        self.logits = self.logits[rows]

    def feed(self, ids: Tensor) -> None:
        """One more token for each row (B)."""
        self.past.feed(ids)
        self.logits = self.model.logits(self.model.hidden(ids[:, None], state=self.state)[:, 0]).float()


@dc.dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Search(Spec):
    """A way to choose tokens, and the rules that it heeds, in this order.

    Rules change the model's own scores, before a temperature; in a beam, log p. A row in which they leave no token
    stops there.
    """

    rules: tuple[Rule, ...] = ()

    def run(
        self, rows: Rows, limits: Sequence[int], ends: Collection[int], seeds: Sequence[int]
    ) -> list[list[Hypothesis]]:
        """The best hypotheses of each row, best first; row b has at most limits[b] tokens, any of `ends` ends it."""
        raise AssertionError(f"{type(self).__name__} does not say how it searches")


@torch.inference_mode()
def decode(
    model: Module,
    prompts: Sequence[Sequence[int]],
    search: Search,
    *,
    limits: Sequence[int],
    end: int | Collection[int] | None,
    memory: Memory | None = None,
    seeds: Sequence[int] | None = None,
) -> list[list[Hypothesis]]:
    """Continue each prompt: best hypotheses first. A row's result does not depend on the rows beside it.

    `limits[b]` bounds the new tokens of row b; `end` is the id that ends a row, or several. An encoder-decoder reads
    `memory=model.encode(source)`. `seeds` tell sampled rows apart; by default their numbers.
    """
    if len(limits) != len(prompts) or min(limits, default=1) < 1:
        raise QkvError(f"{len(prompts)} prompts need as many limits of at least 1 token; found {list(limits)}")
    training = model.training
    model.eval()
    try:
        ends = () if end is None else (end,) if isinstance(end, int) else frozenset(end)
        rows = Rows(model, prompts, memory, limits, search.rules, ends)
        return search.run(rows, limits, ends, seeds if seeds is not None else range(len(prompts)))
    finally:
        model.train(training)
