"""A conversation with a model that was trained to have one."""

from collections.abc import Iterator, Sequence

from qkv.data import ChatTemplate
from qkv.decode import OneByOne, Proposer, Session
from qkv.errors import QkvError
from qkv.use.task import Task

RESERVED = 2048
"""Tokens that a conversation has room for at first."""


class Chat:
    """Messages in the checkpoint's own template. The state is kept: only what is new in a turn is computed."""

    def __init__(
        self, task: Task, system: str | None = None, search: OneByOne | None = None, proposer: Proposer | None = None
    ) -> None:
        self.task, self.search, self.proposer = task, search, proposer
        self.template = ChatTemplate.of(task.target)
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self.session = Session(task.model, RESERVED)

    def say(self, text: str, *, tokens: int = 500, stop: Sequence[str] = (), seed: int = 0) -> Iterator[str]:
        """The answer to one message, as it is made. Only an answer that is read to its end joins the history."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.task.ids(self.template.render(messages), parse=True)
        room = self.task.room
        if room is not None and len(ids) >= room:
            raise QkvError(f"the conversation has {len(ids)} tokens and the model takes {room}: begin a new one")
        answer, session, proposer = "", self.session, self.proposer
        for piece in self.task.stream(
            ids, self.search, tokens=tokens, stop=stop, seed=seed, session=session, proposer=proposer
        ):
            answer += piece
            yield piece
        self.messages = [*messages, {"role": "assistant", "content": answer}]
