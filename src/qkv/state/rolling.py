"""The keys and values that a bounded mask still reaches."""

import dataclasses as dc
from collections.abc import Sequence
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor

from qkv.context import Context, View
from qkv.errors import QkvError
from qkv.masks import Reach
from qkv.state.kv import KV

SLACK = 64
"""So many tokens can be taken back, or fed at a time without a copy of what came before them."""


@dc.dataclass(eq=False)
class Moment:
    """A mark: how long each row was, and the ring as it was before more than `left` tokens were written after it."""

    lengths: Tensor
    left: int
    ring: tuple[Tensor, Tensor, Tensor] | None = None


class Rolling(KV):
    """Keys B G S K and values B G S V of what a mask reaches; when all S slots are taken, new positions replace old.

    Positions below `reach.first` have slots of their own, the others take the `reach.behind` + SLACK slots of a ring in
    turn, so that memory is bounded however long a row grows. What a slot holds follows from the row's length: the
    latest position that falls on it, or the one that it waits for. The mask hides what has not come or was taken back.
    """

    def __init__(self, k: Tensor, v: Tensor, reach: Reach) -> None:
        super().__init__(k, v)
        self.reach = reach
        self.lengths = torch.zeros(len(k), dtype=torch.long, device=k.device)
        self.floor = self.lengths
        """B: of the positions in the ring, those from here on were not replaced before rows were last taken back."""
        self.moments: WeakSet[Moment] = WeakSet()

    @staticmethod
    def slots(reach: Reach, room: int) -> int:
        """How many positions a row of this room keeps."""
        return min(room, reach.first + reach.behind + SLACK)

    @property
    def turn(self) -> int:
        """How many slots the ring has."""
        return max(1, self.room - self.reach.first)

    def slot(self, positions: Tensor) -> Tensor:
        first = self.reach.first
        return torch.where(positions < first, positions, first + (positions - first) % self.turn)

    def holds(self, lengths: Tensor) -> Tensor:
        """1|B S: the position in each slot of rows of these lengths (1|B 1)."""
        first, slots = self.reach.first, torch.arange(self.room, device=lengths.device)
        last = (lengths - 1 - first).clamp(min=-1)
        held = last - (last - slots + first) % self.turn
        return torch.where(slots < first, slots, first + torch.where(held < 0, held + self.turn, held))

    # --- the next tokens ---

    def plan(self, context: Context, T: int) -> View:
        """Few tokens are written, then read; many are read behind what was there, some of which they replace."""
        positions, start = context.positions, context.start
        at = positions[:, :1]
        ends = at + (T if context.lengths is None else context.lengths[:, None])
        kept = (positions < ends) & ((positions >= ends - self.turn) | (positions < self.reach.first))
        slots = torch.where(kept, self.slot(positions), self.room)
        if T <= SLACK:
            seen = self.holds(ends)[:, : None if start is None else start + T]
        else:
            held = self.holds(at)[:, :start]
            held = torch.where(held < at, held, at + T)  # a slot that waits: no query is there yet
            rows = max(len(held), len(positions))
            seen = torch.cat((held.expand(rows, -1), positions.expand(rows, -1)), 1)
        return View(seen=seen, slots=slots, ends=ends[:, 0])

    def write(self, k: Tensor, v: Tensor, context: Context, view: View) -> tuple[Tensor, Tensor]:
        assert view.seen is not None and view.slots is not None and view.ends is not None
        T, S = k.shape[2], view.seen.shape[1]
        k, v = k.to(self.k.dtype), v.to(self.v.dtype)  # under autocast they are narrower
        if self.moments:
            self.remember(T)
        self.lengths = view.ends.expand(len(k))
        seen, before = (k, v), S - T
        if T > SLACK and before:
            seen = torch.cat((self.k[:, :, :before], k), 2), torch.cat((self.v[:, :, :before], v), 2)
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[rows, :, view.slots], self.v[rows, :, view.slots] = k.transpose(1, 2), v.transpose(1, 2)
        return seen if T > SLACK else (self.k[:, :, :S], self.v[:, :, :S])

    # --- rows ---

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.lengths, self.floor, self.moments = self.lengths[rows], self.floor[rows], WeakSet()

    def fork(self, rows: Tensor | None, room: int) -> "Rolling":
        """Copies; a slot is the same position's in rings of every size, as long as the position is below the room."""
        copy, chosen = super().fork(rows, self.slots(self.reach, room)), slice(None) if rows is None else rows
        made = Rolling(copy.k, copy.v, self.reach)
        made.lengths, made.floor = self.lengths[chosen], self.intact()[chosen]
        if rows is None:
            made.moments = WeakSet(self.moments)
        return made

    def join(self, other: Self) -> None:
        self.floor = torch.cat((self.intact(), other.intact()))
        self.lengths = torch.cat((self.lengths, other.lengths))
        self.moments = WeakSet()
        super().join(other)

    def needs(self, rooms: Sequence[int], memories: Sequence[int]) -> int:
        return super().needs([self.slots(self.reach, room) for room in rooms], memories)

    # --- going back ---

    def mark(self) -> Moment:
        first, n = self.reach.first, self.lengths
        left = (n - self.reach.behind).clamp(min=first) + self.reach.behind + SLACK - n
        moment = Moment(n, int(left.min()) if len(n) else 0)
        if bool((n > first).any()):
            self.moments.add(moment)
        return moment

    def remember(self, T: int) -> None:
        """A mark that could not be reached any more after T further tokens keeps the ring as it is now."""
        due = [moment for moment in self.moments if moment.left < T]
        for moment in self.moments:
            moment.left -= T
        if due:
            for moment in due:
                moment.ring = self.k, self.v, self.intact()
                self.moments.discard(moment)
            self.k, self.v = self.k.clone(), self.v.clone()

    def rewind(self, mark: Any, keep: int) -> int:
        """No token is fed again where the ring still holds what comes before; else all are, from the mark on.

        Raises QkvError where the ring has turned since the mark and rows were chosen or joined in between.
        """
        for kept in (keep, 0):
            if self.go(mark.lengths + kept):
                return keep - kept
        if mark.ring is None:
            raise QkvError(
                f"rows that were chosen or joined after a mark go back by at most {SLACK} tokens: mark them again"
            )
        (self.k, self.v), self.floor = (x.clone() for x in mark.ring[:2]), mark.ring[2]
        self.lengths = mark.lengths
        return keep

    def go(self, goal: Tensor) -> bool:
        """Go back to rows of these lengths, if all that the next query may see is there."""
        floor, first = self.intact(), self.reach.first
        alone = goal <= first  # all is in slots of its own
        near = alone | (floor <= (goal - self.reach.behind).clamp(min=first))
        if not bool((near & (goal <= self.lengths)).all()):
            return False
        self.lengths, self.floor = goal.expand(len(self.k)), torch.where(alone, 0, floor)
        return True

    def intact(self) -> Tensor:
        """`floor`, with what was written since."""
        return torch.maximum(self.floor, self.lengths - self.reach.behind - SLACK)
