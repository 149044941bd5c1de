"""The ancestors: recurrent networks, computed by torch's own kernels."""

import dataclasses as dc
from collections.abc import Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops.precision import as_given, wide
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.recurrence import Recurrence
from qkv.spec import part
from qkv.state import Cell, Recurrent

Kernel: TypeAlias = nn.RNN | nn.GRU | nn.LSTM


class Network(Mixer):
    """y_t = W_o h_t; W_o is there where the width of h, `hidden`, is given and is not C."""

    hidden: int | None

    def check(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise QkvError(f"a hidden width of {self.hidden} holds nothing; give at least 1")

    def build(self, width: int) -> Body:
        return _Network(self, width, self.kernel(width, self.hidden or width))

    def kernel(self, width: int, hidden: int) -> Kernel:
        raise AssertionError(f"{type(self).__name__} does not say what it computes")


@part("rnn")
class RNN(Network):
    """h_t = tanh(W x_t + U h_{t−1} + b) (Elman 1990)."""

    hidden: int | None = None

    def kernel(self, width: int, hidden: int) -> Kernel:
        return nn.RNN(width, hidden, batch_first=True)


@part("gru")
class GRU(Network):
    """h_t = (1 − z) ⊙ n + z ⊙ h_{t−1}, n = tanh(W x_t + b + r ⊙ (U h_{t−1} + c)) (Cho 2014).

    The gates r and z are each σ(W′ x_t + U′ h_{t−1} + b′).
    """

    hidden: int | None = None

    def kernel(self, width: int, hidden: int) -> Kernel:
        return nn.GRU(width, hidden, batch_first=True)


@part("lstm")
class LSTM(Network):
    """c_t = f ⊙ c_{t−1} + i ⊙ tanh(W x_t + U h_{t−1} + b), h_t = o ⊙ tanh c_t (Hochreiter 1997, Gers 2000).

    The gates i, f and o are each σ(W′ x_t + U′ h_{t−1} + b′).
    """

    hidden: int | None = None

    def kernel(self, width: int, hidden: int) -> Kernel:
        return nn.LSTM(width, hidden, batch_first=True)


class _Network(Recurrence):
    def __init__(self, spec: Network, width: int, kernel: Kernel) -> None:
        super().__init__()
        self.spec, self.kernel = spec, kernel
        self.out = Linear(kernel.hidden_size, width, axes=("embed", "hidden")) if kernel.hidden_size != width else None

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell:
        weight = self.kernel.get_parameter("weight_hh_l0")
        names = "hc" if isinstance(self.kernel, nn.LSTM) else "h"
        return Recurrent(**{name: weight.new_zeros(batch, weight.shape[1], dtype=wide(weight)) for name in names})

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        now = cell.now if isinstance(cell, Recurrent) else {}
        dtype, first = self.kernel.get_parameter("weight_hh_l0").dtype, self.past(context).first()
        with as_given(x):  # what autocast rounds at every step adds up
            run = Run([value.to(dtype) for value in now.values()], context.lengths)
            y = run(self.kernel, x.to(dtype)) if first is None else run.apart(self.kernel, x.to(dtype), first)
        if isinstance(cell, Recurrent):
            new = {name: value.to(old.dtype) for (name, old), value in zip(now.items(), run.now, strict=True)}
            if context.lengths is not None:  # a row to which nothing was fed stays as it is
                fed = context.lengths[:, None] > 0
                new = {name: torch.where(fed, value, now[name]) for name, value in new.items()}
            cell.now = new
        return y if self.out is None else self.out(y)


@dc.dataclass
class Run:
    """A kernel over rows packed left, of which lengths (B) are real; None is all."""

    now: list[Tensor]
    """h (and c) before the first tokens, B H, and later after the last real ones; none are zeros."""
    lengths: Tensor | None

    def __call__(self, kernel: Kernel, x: Tensor) -> Tensor:
        """x: B T C → B T H."""
        states = [value[None] for value in self.now]
        first = None if not states else states[0] if len(states) == 1 else tuple(states)
        if self.lengths is None:
            y, last = kernel(x, first)
        else:
            real = self.lengths.clamp(min=1).cpu()  # the kernel takes no empty row
            y, last = kernel(pack_padded_sequence(x, real, batch_first=True, enforce_sorted=False), first)
            y, _ = pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])
        self.now = [value[0] for value in (last if isinstance(last, tuple) else (last,))]
        return y

    def apart(self, kernel: Kernel, x: Tensor, first: Tensor) -> Tensor:
        """Documents that share a row become rows of their own; `first` (1|B T) marks where one begins, but the first.

        That one goes on from the state of its row, the others begin with zeros.
        """
        first, steps = first.expand(len(x), -1), torch.arange(x.shape[1], device=x.device)
        documents = first.cumsum(1)
        documents += F.pad((documents[:, -1] + 1).cumsum(0), (1, -1))[:, None]  # counted over all rows
        places = steps - torch.where(first, steps, 0).cummax(1).values
        count, longest = int(documents.max()) + 1, int(places.max()) + 1
        real = torch.ones_like(first) if self.lengths is None else steps < self.lengths[:, None]
        rows = x.new_zeros(count, longest, x.shape[2]).index_put((documents, places), x)
        before = [value.new_zeros(count, value.shape[1]).index_put((documents[:, 0],), value) for value in self.now]
        run = Run(before, documents[real].bincount(minlength=count))
        y = run(kernel, rows)[documents, places]
        last = documents.masked_fill(~real, 0).amax(1)
        self.now = [value[last] for value in run.now]
        return y
