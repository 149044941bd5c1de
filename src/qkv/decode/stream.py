"""One text that grows, token by token."""

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from qkv.decode.greedy import OneByOne
from qkv.decode.rules import NEVER, Past
from qkv.decode.search import several
from qkv.errors import QkvError
from qkv.models import Memory, Module
from qkv.ops.sample import Scores
from qkv.state.state import Mark


class Session:
    """A text and its state. What a longer text shares with the one before is not computed again (a chat's history).

    There is room for `reserved` tokens at first. A text that outgrows its room is begun anew, with twice as much. An
    encoder-decoder reads `memory=model.encode(source)`.
    """

    def __init__(self, model: Module, reserved: int = 0, memory: Memory | None = None) -> None:
        self.model, self.ids, self.memory = model, list[int](), memory
        self.room, self.reserved = 0, reserved
        self.marked: tuple[int, Mark]

    @torch.inference_mode()
    def feed(self, ids: Sequence[int], room: int = 0, trial: int = 0) -> Scores:
        """The text is now `ids`, and may grow to `room` tokens → scores of the next token, 1 V.

        The last `trial` of them are on trial: the next text may well leave them out. Scores are then those of what
        follows the token before them and each of them, 1 + trial V.
        """
        sure = len(ids) - trial
        if sure < 1:
            raise QkvError("a prompt needs at least one token")
        if max(room, len(ids)) > self.room:
            self.begin(max(room, len(ids)))
        same = shared(self.ids, ids[:sure])
        if same < len(self.ids):
            if same < self.marked[0]:
                self.marked = 0, self.beginning
            start, mark = self.marked
            same -= self.state.rewind(mark, same - start)
        self.ids = self.ids[:same]
        # A recurrence reads again what stands after the mark. What is more than the trial is worth a pass of its own.
        if sure - same <= trial:
            self.mark()
            return self.more(ids[same:], 1 + trial)
        x = self.fed(ids[same:sure])[-1:]
        self.mark()
        return self.model.choices(torch.cat((x, self.fed(ids[sure:]))) if trial else x)

    @torch.inference_mode()
    def more(self, ids: Sequence[int], last: int = 1) -> Scores:
        """The text goes on with `ids` → scores of what follows each of the `last` ones, last V.

        There is no look at what was fed before.
        """
        return self.model.choices(self.fed(ids)[-last:])

    def fed(self, ids: Sequence[int]) -> Tensor:
        """T → their hidden vectors, T C, or those of the whole text, where it outgrew its room."""
        if len(self.ids) + len(ids) > self.room:
            ids = [*self.ids, *ids]
            self.begin(len(ids))
        room, self.room = self.room, 0  # a pass that is broken off leaves nothing to go on from
        x = self.model.hidden(torch.tensor([list(ids)], device=self.model.device), state=self.state)
        self.ids += ids
        self.room = room
        return x[0]

    def mark(self) -> None:
        """A later text that begins with this one need not be read again before here."""
        self.marked = len(self.ids), self.state.mark()

    def begin(self, least: int) -> None:
        """An empty state."""
        room, most = max(least, 2 * self.room, self.reserved), self.model.wiring.embed.room
        room = room if most is None else max(least, min(room, most))
        if self.memory is None:
            self.state = self.model.new_state(1, room)
        else:
            self.state = self.model.new_state(1, room, **self.memory)
        self.room, self.ids, self.beginning = room, [], self.state.mark()
        self.marked = 0, self.beginning


def shared(old: Sequence[int], new: Sequence[int]) -> int:
    """How many tokens two texts share at the beginning, short of the whole new one."""
    most = min(len(old), len(new) - 1)
    return next((n for n in range(most) if old[n] != new[n]), most)


def stream(
    model: Module, prompt: Sequence[int], search: OneByOne, *,
    limit: int, ends: int | Collection[int] | None = None, seed: int = 0, session: Session | None = None,
) -> Iterator[int]:  # fmt: skip
    """The ids that continue a prompt, one by one, to an end token (not given) or to `limit` of them."""
    session, choose, room = session or Session(model), search.chooser([seed]), len(prompt) + limit - 1
    over = several(ends)
    past = Past(search.rules, [prompt], [limit], over, model.device)
    row, text, new = torch.zeros(1, dtype=torch.long), list[int](), list(prompt)
    for _ in range(limit):
        with model.evaluating():  # who takes the tokens may train it in between
            # Only where another stream has used the session in between is the whole text looked at again.
            scores = session.more(new) if session.ids is text else session.feed([*text, *new], room)
        scores, text = past.ruled(scores), session.ids
        token = int(choose(scores, row))
        if token in over or scores.x[0, token] == NEVER:
            return
        yield token
        new = [token]
        past.feed(torch.tensor(new))


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to where the first of the `stop` strings begins, however it is cut into pieces."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        found = begins(waiting, stop)
        maybe = min((n for n in range(len(waiting)) if any(s.startswith(waiting[n:]) for s in stop)), default=found)
        if found < len(waiting) and found <= maybe:
            yield waiting[:found]
            return
        if maybe:
            yield waiting[:maybe]
            waiting = waiting[maybe:]
    yield waiting[: begins(waiting, stop)]


def begins(text: str, stop: Sequence[str]) -> int:
    """Where the first of these strings begins in a text; at its end, where none does."""
    return min((text.index(one) for one in stop if one in text), default=len(text))
