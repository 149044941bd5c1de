"""Tokens drawn at random."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qkv.decode.greedy import OneByOne
from qkv.errors import QkvError
from qkv.spec import part


@part("sample")
class Sample(OneByOne):
    """Draw from softmax(z / temperature), cut to the likeliest tokens.

    `top_k` keeps k of them (Fan 2018); `top_p` the fewest that together reach p (Holtzman 2020); `min_p` those at
    least p times as likely as the likeliest (Nguyen 2024). Each row draws from a generator of its own, seeded by
    `seed` and its number, so that a row's text does not depend on the rows beside it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        if not self.temperature > 0:
            raise QkvError("the temperature is above 0; for the likeliest token take greedy")
        if self.top_k is not None and self.top_k < 1:
            raise QkvError("top_k keeps at least 1 token")
        if not 0 < (1.0 if self.top_p is None else self.top_p) <= 1 or not 0 <= (self.min_p or 0.0) <= 1:
            raise QkvError("top_p lies in (0, 1] and min_p in [0, 1]")

    def chooser(self, seeds: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
        generators = [torch.Generator().manual_seed(self.mixed(seed)) for seed in seeds]

        def choose(scores: Tensor, rows: Tensor) -> Tensor:
            p, ids = self.kept(scores)
            draw = torch.stack([torch.rand(1, generator=generators[row]) for row in rows.tolist()]).to(p.device)
            reached = p.cumsum(-1)
            at = torch.searchsorted(reached, draw * reached[:, -1:], right=True).clamp(max=p.shape[1] - 1)
            return ids.gather(1, at)[:, 0]

        return choose

    def mixed(self, row: int) -> int:
        """A seed of 32 bits, all that torch's generator uses, from the sampling's seed and the row's number."""
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {row}".encode(), digest_size=4).digest(), "big")

    def kept(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores z: B V → the probabilities that remain (not normalised) and their ids, likeliest first."""
        z, ids = scores.topk(min(self.top_k or scores.shape[1], scores.shape[1]), -1)
        p = (z / self.temperature).softmax(-1)
        if self.top_p is not None:
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0.0)
        return p, ids
