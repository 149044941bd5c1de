"""A model with its tokenizers, as its user sees it: texts in, texts out."""

import dataclasses as dc
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import TypeVar

import torch

from qkv.data import TextStream, Tokenizers
from qkv.decode import Draft, Greedy, OneByOne, Proposer, Search, Session, decode, speculate, stream
from qkv.decode.stream import until
from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Module
from qkv.parts.head import Classifier, VocabularyHead

S = TypeVar("S", bound=Search)


@dc.dataclass(frozen=True)
class Prediction:
    """One answer to a text."""

    text: str
    score: float
    ids: list[int]


@dc.dataclass(frozen=True)
class Manner:
    """How a checkpoint wants to be used."""

    search: Search = dc.field(default_factory=Greedy)
    """Its rules are heeded whatever search is taken, but for those of a kind that the search has itself."""
    begin: tuple[int, ...] = ()
    """The ids with which a decoder that reads a memory begins; () is the tokenizer's begin token."""
    longest: int | None = None
    """The longest text that it should read, where that is less than it could."""
    unheeded: tuple[str, ...] = ()
    """Settings of its own that are not followed here."""


class Task:
    """A model with its tokenizers. `predict` does what the model was made for:

    an encoder-decoder turns each text into another, a decoder continues it, an encoder fills its mask tokens, and a
    classifier names its class. Vectors, scores, tags and answers found in a text are functions beside it.
    """

    def __init__(self, model: Module, tokenizers: Tokenizers, manner: Manner | None = None) -> None:
        self.model, self.tokenizers, self.manner = model, tokenizers, manner or Manner()
        self.source, self.target = tokenizers.source, tokenizers.target

    # --- to ids ---

    @property
    def pairs(self) -> bool:
        """Whether it reads one text and writes another."""
        return isinstance(self.model, EncoderDecoderModel)

    @property
    def continues(self) -> bool:
        """Whether it continues a text."""
        return not self.pairs and self.model.wiring.mask.incremental

    @property
    def begin(self) -> list[int]:
        """The ids with which an answer begins, where a memory is read."""
        return list(self.manner.begin or (self.target.begin,))

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids that stand before and after a text that the model reads.

        A published tokenizer knows them. A model that qkv trained finds <s> before a text to continue, and </s> after
        one to translate.
        """
        source = self.source
        if source.trained:
            return ([], [source.end]) if self.pairs else ([source.begin] if self.continues else [], [])
        for text in chain("x", (source.decode([n]) for n in range(source.size))):  # it may have no x
            framed = source.prompt(text)
            inside = [n for n, special in enumerate(framed.specials) if not special]
            if inside:
                return framed.ids[: inside[0]], framed.ids[inside[-1] + 1 :]
        raise QkvError("the tokenizer makes no token of any text: copy the checkpoint again")

    @property
    def room(self) -> int | None:
        """The longest text, in tokens, that it reads."""
        own = self.model.source.room if isinstance(self.model, EncoderDecoderModel) else self.model.positions
        return min((n for n in (own, self.manner.longest) if n is not None), default=None)

    def ids(self, text: str, *, parse: bool = False) -> list[int]:
        """The ids of a text alone; with `parse`, special tokens that are spelt out in it are such."""
        return self.known([self.source.parse(text)])[0] if parse else self.ids_of([text])[0]

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text alone."""
        return self.known(self.source.encode_batch(texts))

    def known(self, rows: list[list[int]]) -> list[list[int]]:
        """The same ids, if the model has a row for each."""
        embed = self.model.source if isinstance(self.model, EncoderDecoderModel) else self.model.wiring.embed
        count, most = len(embed.table), max(map(max, filter(None, rows)), default=0)
        if most >= count:
            piece = self.source.pieces([most])[0]
            raise QkvError(f"the tokenizer's {piece!r} has the id {most}, and the model has {count} rows for tokens")
        return rows

    def encode(self, text: str, number: int = 1, *, parse: bool = False) -> list[int]:
        """The ids that the model reads."""
        before, after = self.frame
        return self.fit([*before, *self.ids(text, parse=parse), *after], number)

    def fit(self, ids: list[int], number: int = 1) -> list[int]:
        """The same ids, if they are neither none nor too many."""
        if self.room is not None and len(ids) > self.room:
            raise QkvError(f"text {number} has {len(ids)} tokens and the model takes {self.room}: shorten or split it")
        if not ids:
            raise QkvError(f"text {number} is empty and the model has no token that begins a text: write something")
        return ids

    # --- texts to texts ---

    @property
    def usual(self) -> OneByOne:
        """How it continues a text that is given as it is made: no beam does that."""
        return self.manner.search if isinstance(self.manner.search, OneByOne) else Greedy()

    def heeding(self, search: S) -> S:
        """The same search, with the checkpoint's own rules."""
        own = {type(rule) for rule in search.rules}
        more = tuple(rule for rule in self.manner.search.rules if type(rule) not in own)
        return dc.replace(search, rules=(*search.rules, *more))

    def predict(
        self, texts: Sequence[str], search: Search | None = None, *, batch: int = 64, tokens: int = 200
    ) -> list[list[Prediction]]:
        """The best answers to each text, best first. `tokens` bounds what a decoder adds.

        Texts of like length are batched together; a text's answer does not depend on the texts beside it.
        """
        if batch < 1:
            raise QkvError(f"a batch holds at least 1 text, not {batch}")
        if isinstance(self.model.head, VocabularyHead) and not (self.pairs or self.continues):
            return [[self.fill(text)] for text in texts]
        ids = [self.encode(text, number) for number, text in enumerate(texts, 1)]
        order = sorted(range(len(texts)), key=lambda n: len(ids[n]))
        answers: list[list[Prediction]] = [[] for _ in texts]
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            some = [ids[row] for row in rows]
            if isinstance(self.model.head, VocabularyHead):
                found = self.answer(some, rows, search or self.manner.search, tokens)
            else:
                found = self.classify(some)
            for row, predictions in zip(rows, found, strict=True):
                answers[row] = predictions
        return answers

    def batch(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of ids as a tensor, packed left, and their lengths where they differ."""
        lengths = [len(row) for row in ids]
        padded = torch.tensor(
            [[*row, *[0] * (max(lengths) - len(row))] for row in ids], dtype=torch.long, device=self.model.device
        )
        equal = min(lengths) == max(lengths)
        return padded, None if equal else torch.tensor(lengths, device=self.model.device)

    def fitting(self, tokens: int, read: int) -> int:
        """How many of so many new tokens there is room for after those that are read; the last new one is not read."""
        if tokens < 1:
            raise QkvError(f"{tokens} new tokens are asked for; at least 1 is made")
        room = self.model.wiring.embed.room
        return tokens if room is None else max(1, min(tokens, room - read + 1))

    def answer(self, ids: list[list[int]], rows: list[int], search: Search, tokens: int) -> list[list[Prediction]]:
        model = self.model
        if isinstance(model, EncoderDecoderModel):
            source, lengths = self.batch(ids)
            with torch.inference_mode(), model.evaluating():
                memory = model.encode(source, lengths=lengths)
            prompts = [self.begin] * len(ids)
            wanted = [2 * len(row) + 10 if self.source.trained else tokens for row in ids]
            limits = [self.fitting(one, len(self.begin)) for one in wanted]
        else:
            memory, prompts = None, ids
            limits = [self.fitting(tokens, len(row)) for row in ids]
        how = self.heeding(search)
        found = decode(model, prompts, how, limits=limits, ends=self.target.ends, memory=memory, seeds=rows)
        return [[Prediction(self.target.decode(h.ids), h.score, h.ids) for h in row] for row in found]

    @torch.inference_mode()
    def judged(self, ids: Sequence[Sequence[int]], **given: torch.Tensor) -> torch.Tensor:
        """What the head says of rows, in fp32; an encoder-decoder reads them on both sides, on the second one late."""
        (padded, lengths), model = self.batch(ids), self.model
        with model.evaluating():
            if isinstance(model, EncoderDecoderModel):
                late = torch.cat((torch.full_like(padded[:, :1], self.begin[0]), padded[:, :-1]), 1)
                return model(late, lengths=lengths, **model.encode(padded, lengths=lengths)).float()
            return model(padded, lengths=lengths, **given).float()

    def classify(self, ids: list[list[int]]) -> list[list[Prediction]]:
        """The classes of each row, likeliest first, with log p as their score; one class alone scores a number."""
        head = self.model.head
        if head is None or not isinstance(head.spec, Classifier):
            raise QkvError("this model has no head that answers a text: `qkv embed` gives its vectors")
        log_p = self.judged(ids)
        log_p = log_p.log_softmax(-1) if len(head.spec.labels) > 1 else log_p
        order = log_p.argsort(-1, descending=True).tolist()
        return [
            [Prediction(head.spec.labels[n], float(row[n]), [n]) for n in best]
            for row, best in zip(log_p, order, strict=True)
        ]

    def stream(
        self, ids: Sequence[int], search: OneByOne | None = None, *,
        tokens: int = 200, stop: Sequence[str] = (), seed: int = 0, session: Session | None = None,
        proposer: Proposer | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The text that continues a prompt, as it is made; it ends before any of the `stop` strings.

        A `proposer` makes it come sooner, and no other.
        """
        if not self.continues:
            raise QkvError("only a decoder continues a text: `qkv predict` does what this model was made for")
        if "" in stop:
            raise QkvError("an empty stop string would end every text: leave it out")
        how, limit = self.heeding(search or self.usual), self.fitting(tokens, len(ids))
        ends = self.target.ends
        if proposer is None:
            made = stream(self.model, ids, how, limit=limit, ends=ends, seed=seed, session=session)
        else:
            made = speculate(self.model, ids, how, proposer, limit=limit, ends=ends, seed=seed, session=session)
        yield from until(written(self.target.stream(), made), stop)

    def draft(self, other: "Task") -> Draft:
        """A smaller model of the same tokenizer, to propose what this one writes."""
        if not (self.continues and other.continues):
            raise QkvError("a draft proposes how a text goes on: both models must be decoders")
        theirs, ours = (one.target.pieces(range(one.target.size)) for one in (other, self))
        if theirs != ours:
            raise QkvError("a draft has the model's tokenizer, token by token; the two have different ones")
        return Draft(other.model)

    def fill(self, text: str) -> Prediction:
        """The text with the likeliest token in place of each mask token."""
        ids, places, log_p = self.masked(text)
        for place, row in zip(places, log_p, strict=True):
            ids[place] = int(row.argmax())
        before, after = self.frame
        ids = ids[len(before) : len(ids) - len(after)]
        return Prediction(self.source.decode(ids), float(log_p.amax(1).sum()), ids)

    def candidates(self, text: str, best: int = 5) -> list[list[Prediction]]:
        """For each mask token of a text the tokens that fit best, with their log p."""
        if best < 1:
            raise QkvError(f"{best} candidates are asked for; at least 1 is given")
        _, _, log_p = self.masked(text)
        found = log_p.topk(min(best, log_p.shape[1]))
        return [
            [Prediction(self.source.pieces([token])[0].strip() or "␣", score, [token]) for score, token in row]
            for row in (list(zip(s.tolist(), i.tolist(), strict=True)) for s, i in zip(*found, strict=True))
        ]

    def masked(self, text: str) -> tuple[list[int], list[int], torch.Tensor]:
        """The ids of a text, the places of its mask tokens, and log p of every token there (places × V)."""
        if self.pairs or self.continues or not isinstance(self.model.head, VocabularyHead):
            raise QkvError("only an encoder with a vocabulary head fills masks; a decoder continues: `qkv generate`")
        ids = self.encode(text, parse=True)
        places = [n for n, token in enumerate(ids) if token == self.source.mask]
        if not places:
            spelt = self.source.names["mask_token"]
            raise QkvError(f"there is no {spelt} to fill in {text!r}")
        with torch.inference_mode(), self.model.evaluating():
            x = self.model.hidden(torch.tensor([ids], device=self.model.device))[0, places]
            return ids, places, self.model.logits(x).float().log_softmax(-1)


def written(text: TextStream, ids: Iterator[int]) -> Iterator[str]:
    for token in ids:
        yield text.push(token)
    yield text.close()
