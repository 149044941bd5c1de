"""Several tokens in one pass: something cheap proposes what comes next, the model itself says how much of it stands.

What is written is what the model alone would write, whoever proposes; a good proposer only makes it come sooner. For
p, what the model gives a token, and q, with which it was proposed (Leviathan 2023, Chen 2023):

    keep it with probability min(1, p / q), else draw from what p has more than q, max(p − q, 0), and propose anew.

Where no q is known, the search chooses as ever, and a proposal that it would have chosen stands. That is the same rule
for a q that is 1, with the random numbers of a search that nobody helps: it writes the same text, token by token.
"""

import copy
import dataclasses as dc
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from qkv.decode.greedy import OneByOne
from qkv.decode.rules import NEVER, Past
from qkv.decode.sample import Sample
from qkv.decode.search import several
from qkv.decode.stream import Session
from qkv.errors import QkvError
from qkv.models import Memory, Module
from qkv.ops.sample import Scores

ROW = torch.zeros(1, dtype=torch.long)


@dc.dataclass(frozen=True, eq=False)
class Proposal:
    """A token that may come next."""

    token: int
    q: Tensor | None = None
    """V; the probabilities that it was drawn with. None where it was not drawn, or nobody knows how."""


class Choice:
    """How one search chooses tokens, proposes them, and judges what was proposed."""

    def __init__(self, search: OneByOne, seed: int) -> None:
        self.choose = search.chooser([seed])
        self.sample = search if isinstance(search, Sample) else None
        if self.sample is not None:  # rows are counted from 0 on, so that this number is no row's
            self.generator = torch.Generator().manual_seed(self.sample.mixed(-1 - seed))

    def propose(self, scores: Scores) -> Proposal | None:
        """What a draft with these scores (1 V) proposes; None where rules leave no token."""
        if self.sample is None:
            token, q = int(self.choose(scores, ROW)), None
        else:
            q = self.probabilities(scores)
            token = self.draw(q)
        return None if scores.x[0, token] == NEVER else Proposal(token, q)

    def judge(self, scores: Scores, proposal: Proposal | None) -> int:
        """The next token, by the model's scores (1 V): the proposed one, if it stands."""
        if proposal is None or proposal.q is None:
            return int(self.choose(scores, ROW))
        p, q, token = self.probabilities(scores), proposal.q, proposal.token
        if self.uniform() * float(q[token]) < float(p[token]):
            return token
        rest = (p - q).clamp(min=0)
        return self.draw(rest if bool(rest.any()) else p)  # p = q but for rounding

    def probabilities(self, scores: Scores) -> Tensor:
        """1 V → V: what the search draws from, after its temperature and cuts."""
        assert self.sample is not None
        if self.sample.all:
            return scores.log_p(self.sample.temperature)[0].exp()
        p, ids = self.sample.kept(scores)
        return torch.zeros_like(scores.x[0]).scatter_(0, ids[0], p[0] / p[0].sum())

    def draw(self, weights: Tensor) -> int:
        return int(Scores(weights.log()[None]).draw(torch.tensor([self.uniform()], device=weights.device)))

    def uniform(self) -> float:
        return float(torch.rand((), generator=self.generator))


class Proposer(ABC):
    """What proposes tokens, and how well it did.

    At most `ahead` at a time; where k of the last ones stood, 2k + 1. A pass of many tokens costs more than one of few.
    """

    def __init__(self, ahead: int) -> None:
        if ahead < 1:
            raise QkvError(f"at least 1 token is proposed at a time, not {ahead}")
        self.ahead = self.next = ahead
        self.proposed = self.accepted = self.passes = self.tokens = 0
        """Tokens proposed, and those that stood; passes of the model, and the tokens that came of them."""

    def fits(self, model: Module) -> None:
        """Raise QkvError where it cannot propose for this model."""
        return

    @abstractmethod
    def propose(self, text: list[int], room: int, past: Past, choice: Choice) -> list[Proposal]:
        """Tokens that may follow a text of which `room` will be read, in order; none, if in doubt.

        A text that goes on comes as the same list, which has grown.
        """

    def most(self, text: list[int], room: int) -> int:
        """How many to propose; the last token of a text, the one after `room`, is the model's own."""
        return max(0, min(self.next, room - len(text)))

    def learn(self, proposed: int, accepted: int, tokens: int) -> None:
        """What came of a pass."""
        self.passes, self.tokens = self.passes + 1, self.tokens + tokens
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + accepted
        if proposed:
            self.next = min(self.ahead, 2 * accepted + 1)


class Lookup(Proposer):
    """Proposes what followed when the last tokens stood there before, as many of them as do, up to `longest`.

    Of several places the last one counts. What repeats is taken to go on repeating. For texts that say again what they
    have read, as summaries, corrected code and answers from a document do (Saxena 2023, prompt look-up).
    """

    def __init__(self, longest: int = 8, ahead: int = 7) -> None:
        super().__init__(ahead)
        if longest < 1:
            raise QkvError(f"at least the last token is looked up, not {longest}")
        self.longest = longest
        self.begin([])

    def begin(self, text: list[int]) -> None:
        """What follows an n-gram of this text is to be known: nothing so far."""
        self.text, self.read, self.after = text, 1, dict[tuple[int, ...], int]()

    def propose(self, text: list[int], room: int, past: Past, choice: Choice) -> list[Proposal]:
        if text is not self.text:
            self.begin(text)
        for end in range(self.read, len(text)):  # where n-grams end that something follows
            self.after.update((tuple(text[end - n : end]), end) for n in range(1, min(self.longest, end) + 1))
        self.read, most = len(text), self.most(text, room)
        for n in range(min(self.longest, len(text)), 0, -1):
            if at := self.after.get(tuple(text[-n:])):
                return [Proposal(token) for token in (text[at : at + most] * most)[:most]]
        return []


class Draft(Proposer):
    """Proposes what a smaller model of the same vocabulary would write, by the same search and rules.

    One that reads a memory reads its own: `memory=model.encode(source)`.
    """

    def __init__(self, model: Module, ahead: int = 7, memory: Memory | None = None) -> None:
        super().__init__(ahead)
        self.model, self.session = model.eval(), Session(model, memory=memory)

    def fits(self, model: Module) -> None:
        own, other = (len(one.wiring.embed.table) for one in (self.model, model))
        if own != other:
            raise QkvError(f"a draft has the model's vocabulary: it has {own} tokens and the model has {other}")

    def propose(self, text: list[int], room: int, past: Past, choice: Choice) -> list[Proposal]:
        room = min(room, self.model.wiring.embed.room or room)
        past, made, new = copy.copy(past), list[Proposal](), list[int]()
        for _ in range(self.most(text, room)):
            scores = self.session.more(new) if new else self.session.feed(text, room)
            proposal = choice.propose(past.ruled(scores))
            if proposal is None:
                break
            made.append(proposal)
            new = [proposal.token]
            past.feed(torch.tensor(new))
        return made


def speculate(
    model: Module, prompt: Sequence[int], search: OneByOne, proposer: Proposer, *,
    limit: int, ends: int | Collection[int] | None = None, seed: int = 0, session: Session | None = None,
) -> Iterator[int]:  # fmt: skip
    """As `stream`, several tokens a pass where the proposer is right.

    With greedy search, or a proposer that draws nothing, the ids are those of `stream`; with a draft that draws, their
    distribution is the same. A native program scores tokens of one pass as it does one by one, to the bit; torch may
    round otherwise.
    """
    proposer.fits(model)
    session, choice, room = session or Session(model), Choice(search, seed), len(prompt) + limit - 1
    last = several(ends)
    past = Past(search.rules, [prompt], [limit], last, model.device)
    text = list(prompt)
    over = False
    while len(text) <= room and not over:
        proposals = proposer.propose(text, room, past, choice)
        with model.evaluating():
            found = session.feed([*text, *(one.token for one in proposals)], room, trial=len(proposals))
        before, stood = len(text), 0
        for scores, proposal in zip(found.split([1] * len(found)), [*proposals, None], strict=True):
            scores = past.ruled(scores)
            token = choice.judge(scores, proposal)
            stands = proposal is not None and token == proposal.token
            stood += stands
            over = token in last or float(scores.x[0, token]) == NEVER
            if not over:
                text.append(token)
                past.feed(torch.tensor([token]))
            if over or not stands:
                break
        proposer.learn(len(proposals), stood, len(text) - before)
        yield from text[before:]
