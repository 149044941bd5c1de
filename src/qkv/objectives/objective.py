"""What every objective does: make an example of a batch, and give its loss."""

import dataclasses as dc
from typing import ClassVar

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.data import Batch
from qkv.errors import QkvError
from qkv.models import Model, Module
from qkv.objectives.auxiliary import Auxiliary, listen, weighted
from qkv.spec import Spec


@dc.dataclass(frozen=True)
class Vocabulary:
    """The ids that a corruption needs."""

    size: int
    mask: int
    specials: tuple[int, ...]


@dc.dataclass(frozen=True, eq=False)
class Example:
    """What one forward pass learns from; rows are packed left."""

    inputs: Tensor
    """B T."""
    lengths: Tensor | None
    """B; None where every row is full."""
    labels: Tensor
    """N: the ids to predict, in row order."""
    chosen: Tensor
    """B T, true at the N places whose output is compared with a label."""
    source: Tensor | None = None
    source_lengths: Tensor | None = None

    @property
    def tokens(self) -> int:
        """N: what the loss is divided by."""
        return len(self.labels)

    @property
    def longest(self) -> int:
        """The most positions that a row of it takes."""
        return max(self.inputs.shape[1], 0 if self.source is None else self.source.shape[1])

    def to(self, device: torch.device) -> "Example":
        """The example on a device."""
        values = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        return dc.replace(self, **{name: value.to(device) for name, value in values.items() if value is not None})


class Objective(Spec):
    """Losses are sums over tokens, so that any division of a batch into smaller ones gives the same gradient."""

    pairs: ClassVar[bool] = False
    """Whether it learns from pairs of texts or from running text."""
    auxiliary: tuple[Auxiliary, ...] = ()
    """What is added to the loss of each token in training; an objective that can learn with experts has the field."""

    def refuse(self, model: Model) -> None:
        """Raise `QkvError` where this model cannot learn this."""

    def example(self, batch: Batch, vocabulary: Vocabulary, generator: torch.Generator) -> Example:
        """Corrupt a batch; all that is random comes from the generator."""
        raise AssertionError(f"{type(self).__name__} does not say what it learns")

    def loss(self, model: Module, example: Example, *, smooth: bool = True) -> Tensor:
        """Σ over the example's tokens; without `smooth` the negative log-likelihood that perplexity is made of."""
        if not smooth or not self.auxiliary:
            return self.predict(model, example, smooth)
        tap = listen(self.auxiliary)
        return self.predict(model, example, smooth, tap) + example.tokens * weighted(self.auxiliary, tap)

    def predict(self, model: Module, example: Example, smooth: bool, tap: Tap | None = None) -> Tensor:
        """The loss by itself; the model's passes are seen by the tap."""
        raise AssertionError(f"{type(self).__name__} does not say what its loss is")


def check_smoothing(share: float) -> None:
    if not 0 <= share < 1:
        raise QkvError(f"label_smoothing is a share of the probability, in [0, 1), not {share}")


def ragged(lengths: Tensor, size: int) -> Tensor | None:
    """None where every row fills all `size` columns, which spares attention its mask."""
    return None if bool((lengths == size).all()) else lengths


def filled(lengths: Tensor, size: int) -> Tensor:
    """B T: the real places of rows of these lengths."""
    return torch.arange(size) < lengths[:, None]
