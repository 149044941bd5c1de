"""One text that grows, token by token."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from qkv.decode.greedy import OneByOne
from qkv.errors import QkvError
from qkv.models import Module


class Session:
    """A text and its state. What a longer text shares with the one before is not computed again (a chat's history)."""

    def __init__(self, model: Module) -> None:
        self.model, self.ids = model, list[int]()
        self.room = 0

    @torch.inference_mode()
    def feed(self, ids: Sequence[int], room: int = 0) -> Tensor:
        """The text is now `ids`, and may grow to `room` tokens → log p of the next token, 1 V in fp32."""
        if not ids:
            raise QkvError("a prompt needs at least one token")
        if max(room, len(ids)) > self.room:
            self.room, self.ids = max(room, len(ids)), []
            self.state = self.model.new_state(1, self.room)
            self.beginning = self.state.mark()
        same = shared(self.ids, ids)
        if same < len(self.ids):
            same -= self.state.rewind(self.beginning, same)
        x = self.model.hidden(torch.tensor([list(ids[same:])], device=self.model.device), state=self.state)
        self.ids = list(ids)
        return self.model.logits(x[:, -1]).float().log_softmax(-1)


def shared(old: Sequence[int], new: Sequence[int]) -> int:
    """How many tokens two texts share at the beginning, short of the whole new one."""
    most = min(len(old), len(new) - 1)
    return next((n for n in range(most) if old[n] != new[n]), most)


def stream(
    model: Module, prompt: Sequence[int], search: OneByOne, *,
    limit: int, ends: Collection[int] = (), seed: int = 0, session: Session | None = None,
) -> Iterator[int]:  # fmt: skip
    """The ids that continue a prompt, one by one, to an end token (not given) or to `limit` of them."""
    session, choose, ids = session or Session(model), search.chooser([seed]), list(prompt)
    model.eval()
    row = torch.zeros(1, dtype=torch.long)
    for _ in range(limit):
        token = int(choose(session.feed(ids, len(prompt) + limit), row))
        if token in ends:
            return
        yield token
        ids.append(token)
