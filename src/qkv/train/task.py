"""A trained model as its user sees it: texts in, texts out."""

import dataclasses as dc
from collections.abc import Sequence

import torch

from qkv.data import Tokenizers
from qkv.decode import Search, decode
from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Module, SequenceModel


@dc.dataclass(frozen=True)
class Prediction:
    """One answer to a text."""

    text: str
    score: float
    ids: list[int]


class Task:
    """A model with its tokenizers. `predict` does what the model was made for:

    an encoder-decoder turns each text into another, a decoder continues it, an encoder fills its mask tokens.
    """

    def __init__(self, model: Module, tokenizers: Tokenizers) -> None:
        self.model, self.tokenizers = model, tokenizers
        self.source, self.target = tokenizers.source, tokenizers.target

    def predict(
        self, texts: Sequence[str], search: Search, *, batch: int = 64, tokens: int = 200
    ) -> list[list[Prediction]]:
        """The best answers to each text, best first. `tokens` bounds what a decoder adds.

        Texts of like length are batched together; a text's answer does not depend on the texts beside it.
        """
        if isinstance(self.model, SequenceModel) and not self.model.spec.mask.incremental:
            return [[self.fill(text)] for text in texts]
        ids = [self.encode(text, number) for number, text in enumerate(texts, 1)]
        order = sorted(range(len(texts)), key=lambda n: len(ids[n]))
        answers: list[list[Prediction]] = [[] for _ in texts]
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            for row, found in zip(rows, self.answer([ids[row] for row in rows], rows, search, tokens), strict=True):
                answers[row] = found
        return answers

    def encode(self, text: str, number: int = 1) -> list[int]:
        """The ids that the model reads: a source ends in </s>, a prompt begins with <s>."""
        pairs = isinstance(self.model, EncoderDecoderModel)
        ids = [*self.source.encode(text), self.source.end] if pairs else [self.source.begin, *self.source.encode(text)]
        room = self.model.source.room if isinstance(self.model, EncoderDecoderModel) else self.model.positions
        if room is not None and len(ids) > room:
            raise QkvError(f"text {number} has {len(ids)} tokens and the model takes {room}: shorten or split it")
        return ids

    def answer(self, ids: list[list[int]], rows: list[int], search: Search, tokens: int) -> list[list[Prediction]]:
        model, end, room = self.model, self.target.end, self.model.wiring.embed.room or 1 << 30
        if isinstance(model, EncoderDecoderModel):
            lengths = torch.tensor([len(row) for row in ids])
            source = torch.tensor([row + [self.source.pad] * (int(lengths.max()) - len(row)) for row in ids])
            with torch.inference_mode():
                equal = bool((lengths == lengths[0]).all())
                memory = model.eval().encode(
                    source.to(model.device), lengths=None if equal else lengths.to(model.device)
                )
            prompts = [[self.target.begin]] * len(ids)
            limits = [min(2 * len(row) + 10, room - 1) for row in ids]
        else:
            assert isinstance(model, SequenceModel)
            memory, prompts = None, ids
            limits = [max(1, min(tokens, room - len(row))) for row in ids]
        found = decode(model, prompts, search, limits=limits, end=end, memory=memory, seeds=rows)
        return [[Prediction(self.target.decode(h.ids), h.score, h.ids) for h in row] for row in found]

    def fill(self, text: str) -> Prediction:
        """The text with the likeliest token in place of each `<mask>`."""
        assert isinstance(self.model, SequenceModel)
        mask = self.source.mask
        pieces = [self.source.encode(piece) for piece in text.split("<mask>")]
        ids = [token for piece in pieces for token in (mask, *piece)][1:]
        places = [n for n, token in enumerate(ids) if token == mask]
        if not places:
            raise QkvError(f"there is no <mask> to fill in {text!r}")
        with torch.inference_mode():
            log_p = self.model.eval()(torch.tensor([ids], device=self.model.device))[0].float().log_softmax(-1)
        for place in places:
            ids[place] = int(log_p[place].argmax())
        score = sum(float(log_p[place, ids[place]]) for place in places)
        return Prediction(self.source.decode(ids), score, ids)
