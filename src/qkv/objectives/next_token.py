"""Predict each token from those before it."""

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.data import Batch
from qkv.errors import QkvError
from qkv.models import Model, Module, Sequence
from qkv.objectives.auxiliary import Auxiliary
from qkv.objectives.objective import Example, Objective, Vocabulary, check_smoothing, filled, ragged
from qkv.parts import Head
from qkv.spec import part


def shifted(batch: Batch) -> Example:
    """Inputs are all tokens but the last, labels all but the first."""
    lengths = batch.target_lengths - 1
    inputs, chosen = batch.target[:, :-1], filled(lengths, batch.target.shape[1] - 1)
    return Example(inputs, ragged(lengths, inputs.shape[1]), batch.target[:, 1:][chosen], chosen)


@part("next-token")
class NextToken(Objective):
    """−Σ log p(y_t | y_<t) (Bengio 2003); `label_smoothing` ε spreads ε over the vocabulary."""

    label_smoothing: float = 0.0
    auxiliary: tuple[Auxiliary, ...] = ()

    def check(self) -> None:
        check_smoothing(self.label_smoothing)

    def refuse(self, model: Model) -> None:
        if not isinstance(model, Sequence) or not model.mask.causal or not isinstance(model.head, Head):
            raise QkvError("next-token needs a decoder: a sequence model with a vocabulary head, whose mask is causal")

    def example(self, batch: Batch, vocabulary: Vocabulary, generator: torch.Generator) -> Example:
        return shifted(batch)

    def predict(self, model: Module, example: Example, smooth: bool, tap: Tap | None = None) -> Tensor:
        x = model.hidden(example.inputs, lengths=example.lengths, tap=tap)[example.chosen]
        return model.loss(x, example.labels, self.label_smoothing if smooth else 0.0)
