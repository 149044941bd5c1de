"""What every recurrence needs to know of the mask: where a document begins."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from qkv.context import Context, View
from qkv.masks import Causal, Full
from qkv.parts.mixers.body import Body
from qkv.state import Cell

TILE = 64
"""The mask is asked about so many tokens at once: only the diagonal of what it says is looked at."""
LONG_AGO = 1 << 30


@dataclass(eq=False, slots=True)
class Past(View):
    """The view of a recurrence."""

    ages: Tensor | None = None
    """1|B T: how many tokens of its own document stand before each token; None where there is one document."""

    def first(self) -> Tensor | None:
        """1|B T: the tokens that begin a document."""
        return None if self.ages is None else self.ages == 0


class Recurrence(Body):
    """A body whose past reaches a token only through the token before it."""

    def look(self) -> Hashable:
        return "recurrence"

    def prepare(self, context: Context, cell: Cell | None, T: int) -> Past:
        return Past(ages=ages(context, T))

    def past(self, context: Context) -> Past:
        """This body's view in the loop."""
        assert self.view is not None
        past = context.views[self.view]
        assert isinstance(past, Past)
        return past


def ages(context: Context, T: int) -> Tensor | None:
    """Ask the model's mask which tokens may see the token before them: one that may not begins a document.

    A recurrence obeys no other mask: what may be seen must have come in order.
    """
    if context.mask in (Causal(), Full()) or T == 1:
        return None
    at, seen = context.positions, []
    for start in range(1, T, TILE):
        rows, columns = at[:, start : start + TILE], at[:, start - 1 : start + TILE - 1][:, : T - start]
        allowed = context.mask.allow(rows[..., None], columns[:, None], context)
        if allowed is None:
            allowed = at.new_ones(1, 1, 1, dtype=torch.bool)
        n = rows.shape[1]
        seen.append(allowed.expand(-1, n, n).diagonal(dim1=1, dim2=2))
    B, valid = max(len(part) for part in seen), context.valid()
    begins = ~torch.cat([part.expand(B, -1) for part in seen], 1)
    if valid is not None:  # padding begins nothing: a memory of the tokens before it goes on
        begins = begins & valid[:, 1:]
    at = torch.arange(1, T, device=at.device).expand(len(begins), -1)
    last = torch.where(begins, at, -LONG_AGO).cummax(1).values  # the first token goes on where an earlier call stopped
    return torch.cat((at.new_full((len(begins), 1), LONG_AGO), at - last), 1)
