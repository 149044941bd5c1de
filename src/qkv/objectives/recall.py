"""Predict what can be recalled."""

import dataclasses as dc

import torch
from torch import Tensor

from qkv.data import Batch
from qkv.objectives.next_token import NextToken, shifted
from qkv.objectives.objective import Example, Vocabulary
from qkv.spec import part


@part("recall")
class Recall(NextToken):
    """−Σ log p(y_t | y_<t) over the t whose y_t stood after y_{t−1} before in the row (Arora 2023: "AR hits").

    The rest of the text is read and not learned: it is what no model can know, or other objectives' business.
    """

    def example(self, batch: Batch, vocabulary: Vocabulary, generator: torch.Generator) -> Example:
        made = shifted(batch)
        chosen = made.chosen & repeated(batch.target)
        return dc.replace(made, labels=batch.target[:, 1:][chosen], chosen=chosen)


def repeated(ids: Tensor) -> Tensor:
    """ids B T → B T−1: whether the tokens t and t + 1 stood side by side before."""
    pairs = ids[:, :-1] * (1 + ids.max()) + ids[:, 1:]
    values, order = pairs.sort(stable=True)  # of equal pairs the first comes first
    again = torch.zeros_like(pairs, dtype=torch.bool)
    again[:, 1:] = values[:, 1:] == values[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)
