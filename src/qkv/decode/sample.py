"""Tokens drawn at random."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.decode.greedy import Choose, OneByOne
from qkv.errors import QkvError
from qkv.ops.sample import Scores, naive
from qkv.spec import part

FEW = 64
"""How many of the likeliest tokens are looked at first where it is not said how many are kept: mostly enough."""
WIDER = 8
"""By how much more are looked at where it is not."""


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
        if not self.temperature >= 1e-6:
            raise QkvError("the temperature is at least 1e-6; for the likeliest token take greedy")
        if self.top_k is not None and self.top_k < 1:
            raise QkvError("top_k keeps at least 1 token")
        if not 0 < (1.0 if self.top_p is None else self.top_p) <= 1 or not 0 <= (self.min_p or 0.0) <= 1:
            raise QkvError("top_p lies in (0, 1] and min_p in [0, 1]")

    def chooser(self, seeds: Sequence[int]) -> Choose:
        generators = [torch.Generator().manual_seed(self.mixed(seed)) for seed in seeds]

        def choose(scores: Scores, rows: Tensor) -> Tensor:
            u = torch.cat([torch.rand(1, generator=generators[row]) for row in rows.tolist()]).to(scores.x.device)
            if self.all:
                return scores.draw(u, self.temperature)
            p, ids = self.kept(scores)
            return ids.gather(1, naive.draw(p, u)[:, None])[:, 0]

        return choose

    def mixed(self, row: int) -> int:
        """A seed of 32 bits, all that torch's generator uses, from the sampling's seed and the row's number."""
        return int.from_bytes(hashlib.blake2b(f"{self.seed} {row}".encode(), digest_size=4).digest(), "big")

    @property
    def nucleus(self) -> bool:
        return (self.top_p or 1.0) < 1

    @property
    def all(self) -> bool:
        """Whether nothing is cut."""
        return self.top_k is None and not self.nucleus and not self.min_p

    def kept(self, scores: Scores) -> tuple[Tensor, Tensor]:
        """Scores z: B V → the probabilities that remain (not normalised) and their ids, likeliest first."""
        V = scores.x.shape[1]
        if self.top_k is None:
            mass = scores.mass(self.temperature) if self.nucleus else None
            return self.searched(scores, V if self.all else min(FEW, V), mass)
        z, ids = scores.largest(min(self.top_k, V))
        return self.cut(z), ids

    def searched(self, scores: Scores, k: int, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is kept among the k likeliest of each row, and among more where none of these is cut."""
        V = scores.x.shape[1]
        z, ids = scores.largest(k)
        p = self.cut(z, mass)
        more = (p[:, -1] > 0).nonzero()[:, 0]
        if k == V or not len(more):
            return p, ids
        some = scores.changed(scores.x[more])
        wider, their = self.searched(some, min(WIDER * k, V), None if mass is None else mass[more])
        p, ids = (F.pad(x, (0, wider.shape[1] - k)) for x in (p, ids))
        return p.index_copy(0, more, wider), ids.index_copy(0, more, their)

    def cut(self, z: Tensor, mass: Tensor | None = None) -> Tensor:
        """The likeliest scores z, in order: B k → e^{(z − max z) / temperature}, and 0 for what is not kept.

        `mass` (B 1) is the sum over all tokens; None where it is that over these.
        """
        p = ((z - z[:, :1]) / self.temperature).exp()
        if self.top_p is not None and self.nucleus:
            reached = p.cumsum(-1)
            p = p.masked_fill(reached - p >= self.top_p * (reached[:, -1:] if mass is None else mass), 0.0)
        if self.min_p is not None:
            p = p.masked_fill(p < self.min_p, 0.0)
        return p
