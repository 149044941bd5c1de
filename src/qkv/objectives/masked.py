"""Predict hidden tokens from both sides."""

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.data import Batch
from qkv.errors import QkvError
from qkv.models import Model, Module, Sequence
from qkv.objectives.auxiliary import Auxiliary
from qkv.objectives.objective import Example, Objective, Vocabulary, filled, ragged
from qkv.parts import Head
from qkv.spec import part


@part("masked")
class MaskedTokens(Objective):
    """−Σ log p(y_t | the rest) at a share of the places (Devlin 2018), drawn anew each time (Liu 2019).

    Of the drawn places `hide` show the mask token, `swap` a random token, the others the token itself.
    """

    share: float = 0.15
    hide: float = 0.8
    swap: float = 0.1
    auxiliary: tuple[Auxiliary, ...] = ()

    def check(self) -> None:
        if not 0 < self.share <= 1 or min(self.hide, self.swap) < 0 or self.hide + self.swap > 1:
            raise QkvError("share lies in (0, 1], and hide and swap together in [0, 1]")

    def refuse(self, model: Model) -> None:
        if not isinstance(model, Sequence) or model.mask.causal or not isinstance(model.head, Head):
            raise QkvError("masked tokens need an encoder: a sequence model with a vocabulary head, whose mask is full")

    def example(self, batch: Batch, vocabulary: Vocabulary, generator: torch.Generator) -> Example:
        ids, lengths = batch.target, batch.target_lengths
        real = filled(lengths, ids.shape[1])
        for special in vocabulary.specials:
            real &= ids != special
        chance = torch.where(real, torch.rand(ids.shape, generator=generator), 2.0)
        chosen = chance < self.share
        if not bool(chosen.any()):
            chosen = real & (chance == chance.min())  # a batch too short to draw from still teaches one token
        fate = torch.rand(ids.shape, generator=generator)
        ordinary = torch.ones(vocabulary.size, dtype=torch.bool)
        ordinary[list(vocabulary.specials)] = False
        words = ordinary.nonzero()[:, 0]
        random = words[torch.randint(len(words), ids.shape, generator=generator)]
        shown = torch.where(chosen & (fate < self.hide), vocabulary.mask, ids)
        shown = torch.where(chosen & (fate >= self.hide) & (fate < self.hide + self.swap), random, shown)
        return Example(shown, ragged(lengths, ids.shape[1]), ids[chosen], chosen)

    def predict(self, model: Module, example: Example, smooth: bool, tap: Tap | None = None) -> Tensor:
        x = model.hidden(example.inputs, lengths=example.lengths, tap=tap)[example.chosen]
        return model.loss(x, example.labels)
