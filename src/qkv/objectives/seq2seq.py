"""Predict each target token from the source and the target tokens before it."""

import dataclasses as dc
from typing import ClassVar

import torch
from torch import Tensor

from qkv.context import Tap
from qkv.data import Batch
from qkv.errors import QkvError
from qkv.models import EncoderDecoder, EncoderDecoderModel, Model, Module
from qkv.objectives.auxiliary import Auxiliary
from qkv.objectives.next_token import shifted
from qkv.objectives.objective import Example, Objective, Vocabulary, check_smoothing, ragged
from qkv.spec import part


@part("seq2seq")
class Seq2Seq(Objective):
    """−Σ log p(y_t | y_<t, x) with the true y_<t fed in (teacher forcing); smoothed by ε (Vaswani 2017 takes 0.1)."""

    label_smoothing: float = 0.0
    auxiliary: tuple[Auxiliary, ...] = ()

    pairs: ClassVar[bool] = True

    def check(self) -> None:
        check_smoothing(self.label_smoothing)

    def refuse(self, model: Model) -> None:
        if not isinstance(model, EncoderDecoder):
            raise QkvError("seq2seq needs an encoder-decoder model; take a preset such as transformer-tiny")

    def example(self, batch: Batch, vocabulary: Vocabulary, generator: torch.Generator) -> Example:
        if batch.source is None or batch.source_lengths is None:
            raise QkvError("seq2seq learns from pairs: name the columns source and target in [data]")
        lengths = ragged(batch.source_lengths, batch.source.shape[1])
        return dc.replace(shifted(batch), source=batch.source, source_lengths=lengths)

    def predict(self, model: Module, example: Example, smooth: bool, tap: Tap | None = None) -> Tensor:
        assert isinstance(model, EncoderDecoderModel) and example.source is not None
        memory = model.encode(example.source, lengths=example.source_lengths, tap=tap)
        x = model.hidden(example.inputs, lengths=example.lengths, tap=tap, **memory)[example.chosen]
        return model.loss(x, example.labels, self.label_smoothing if smooth else 0.0)
