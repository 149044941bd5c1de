"""Rules that a search heeds: what it may not write, must write, or should write less often."""

from collections.abc import Collection, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.errors import QkvError
from qkv.ops.sample import Scores
from qkv.spec import Spec, part

NEVER = float("-inf")


class Rule(Spec):
    """A change of the scores of what comes next; −∞ forbids a token."""

    def __call__(self, scores: Tensor, past: "Past") -> Tensor:
        """B V → B V, a new tensor or the same one, never changed in place."""
        raise AssertionError(f"{type(self).__name__} does not say what it changes")


class Past:
    """What the rows of a search have read and made, and the rules that look at it; without rules it costs nothing.

    `ids` (B T) are packed to the right, with −1 where a row has none; `made` of them are new, in each row. `lengths`
    (B) are the prompts', `limits` (B) bound the new tokens, and any of `ends` ends a row.
    """

    def __init__(
        self, rules: Sequence[Rule], prompts: Sequence[Sequence[int]], limits: Sequence[int],
        ends: Collection[int], device: torch.device,
    ) -> None:  # fmt: skip
        self.rules, self.made = rules, 0
        if rules:
            lengths = [len(prompt) for prompt in prompts]
            ids = [[*[-1] * (max(lengths) - len(prompt)), *prompt] for prompt in prompts]
            self.ids, self.lengths = torch.tensor(ids, device=device), torch.tensor(lengths, device=device)
            self.limits = torch.tensor(limits, device=device)
            self.ends = torch.tensor(sorted(ends), dtype=torch.long, device=device)

    def ruled(self, scores: Scores) -> Scores:
        """The scores (B V) after all rules, one by one."""
        x = scores.x
        for rule in self.rules:
            x = rule(x, self)
        return scores.changed(x)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.rules:
            self.ids, self.lengths, self.limits = self.ids[rows], self.lengths[rows], self.limits[rows]

    def feed(self, ids: Tensor) -> None:
        """One more token for each row (B)."""
        if self.rules:
            self.ids, self.made = torch.cat((self.ids, ids[:, None].to(self.ids.device)), 1), self.made + 1


def spread(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of scores (B V) with a column more, and ids (N or B N) as its columns; an id that V lacks is the last."""
    V = scores.shape[1]
    return F.pad(scores, (0, 1)), ids.where((ids >= 0) & (ids < V), V).expand(len(scores), -1)


def without(scores: Tensor, ids: Tensor) -> Tensor:
    """The scores, these ids (N or B N) forbidden; −1 forbids none."""
    wide, columns = spread(scores, ids)
    return wide.scatter_(1, columns, NEVER)[:, :-1]


def only(scores: Tensor, token: int) -> Tensor:
    """The scores of this token alone."""
    if token >= scores.shape[1]:
        raise QkvError(f"the token {token} is to be forced, and the model has {scores.shape[1]}: name another")
    forced = torch.full_like(scores, NEVER)
    forced[:, token] = 0.0
    return forced


@part("repetition-penalty")
class RepetitionPenalty(Rule):
    """Tokens that are there already, in the prompt too, score s / penalty where s > 0, else s · penalty (Keskar 2019).

    s are the model's own scores; in a beam, log p. Above 1 a text repeats less, below 1 more.
    """

    penalty: float

    def check(self) -> None:
        if not 0 < self.penalty < float("inf"):
            raise QkvError(f"a repetition penalty is above 0, and 1 does nothing; found {self.penalty}")

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        wide, columns = spread(scores, past.ids)
        seen = wide.gather(1, columns)
        seen = torch.where(seen < 0, seen * self.penalty, seen / self.penalty)
        return wide.scatter_(1, columns, seen)[:, :-1]


@part("no-repeat")
class NoRepeat(Rule):
    """No `size` tokens in a row come twice; the prompt counts (Paulus 2018). 0 does nothing."""

    size: int

    def check(self) -> None:
        if self.size < 0:
            raise QkvError(f"1 token in a row or more may be kept from coming twice, 0 for none; found {self.size}")

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        n, T = self.size, past.ids.shape[1]
        if n == 0 or n > T:
            return scores
        windows = past.ids.unfold(1, n, 1)
        begun = (windows[..., :-1] == past.ids[:, None, T - n + 1 :]).all(-1)
        return without(scores, windows[..., -1].where(begun, -1))


@part("ban")
class Ban(Rule):
    """These words, each of one or several ids, are never written. An end by itself is no word."""

    words: tuple[tuple[int, ...], ...]

    def check(self) -> None:
        if () in self.words:
            raise QkvError("a banned word has at least one id: leave the empty one out")

    @cached_property
    def by_length(self) -> list[Tensor]:
        """The words of each length (N n), short ones first."""
        lengths = sorted({len(word) for word in self.words})
        return [torch.tensor([word for word in self.words if len(word) == n]) for n in lengths]

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        T = past.ids.shape[1]
        for words in self.by_length:
            words, n = words.to(scores.device), words.shape[1]
            if n > T + 1:
                break
            begun = (words[:, :-1] == past.ids[:, None, T - n + 1 :]).all(-1)
            last = words[:, -1].where(begun, -1)
            scores = without(scores, last.where(~torch.isin(last, past.ends), -1) if n == 1 else last)
        return scores


@part("at-least")
class AtLeast(Rule):
    """No end before there are so many tokens, new ones, or together with those of the prompt."""

    tokens: int
    prompt: bool = False

    def check(self) -> None:
        if self.tokens < 0:
            raise QkvError(f"a text has at least 0 tokens, not {self.tokens}")

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        missing = self.tokens - past.made
        if missing <= 0:
            return scores
        short = past.lengths * self.prompt < missing
        return without(scores, past.ends.where(short[:, None], -1))


@part("suppress")
class Suppress(Rule):
    """These tokens are never written."""

    tokens: tuple[int, ...]

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        ids = torch.tensor(self.tokens, dtype=torch.long, device=scores.device)
        return without(scores, ids)


@part("suppress-first")
class SuppressFirst(Suppress):
    """These tokens are not the first new one, or not the one that follows `after` new ones."""

    after: int = 0

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        return super().__call__(scores, past) if past.made == self.after else scores


@part("force-first")
class ForceFirst(Rule):
    """The first new token is this one, with log p = 0."""

    token: int

    def check(self) -> None:
        check_token(self.token)

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        return only(scores, self.token) if past.made == 0 else scores


@part("force-last")
class ForceLast(Rule):
    """A text that reaches its limit closes with this token, with log p = 0."""

    token: int

    def check(self) -> None:
        check_token(self.token)

    def __call__(self, scores: Tensor, past: Past) -> Tensor:
        last = past.limits == past.made + 1
        return torch.where(last[:, None], only(scores, self.token), scores) if bool(last.any()) else scores


def check_token(token: int) -> None:
    if token < 0:
        raise QkvError(f"a token that is forced has an id from 0 on, not {token}")
