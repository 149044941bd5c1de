"""Positions that join the token embedding."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.parts.linear import Linear
from qkv.spec import Spec, part


class PositionEmbedding(Spec):
    """Builds a module `(x: B T C, positions: 1|B T) → B T C`; its `room` is how many positions there are, or None."""

    def build(self, width: int) -> nn.Module:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


@part("learned")
class Learned(PositionEmbedding):
    """x + P[position + offset], P a table of `size` rows (Gehring 2017, Devlin 2018).

    An `offset` leaves the first rows unused, as where positions were once numbered behind the padding's id.
    """

    size: int
    offset: int = 0

    def check(self) -> None:
        if not 0 <= self.offset < self.size:
            raise QkvError(f"an offset of {self.offset} leaves no position in a table of {self.size} rows")

    def build(self, width: int) -> nn.Module:
        return _Learned(self, width)


class _Learned(nn.Module):
    spec: Learned

    def __init__(self, spec: Learned, width: int) -> None:
        super().__init__()
        self.spec, self.room = spec, spec.size - spec.offset
        self.weight = nn.Parameter(torch.empty(spec.size, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        # Padding past the end of a row may lie beyond the table; what it reads there is never seen.
        return x + F.embedding(positions.clamp(max=self.room - 1) + self.spec.offset, self.weight)


@part("sinusoidal")
class Sinusoidal(PositionEmbedding):
    """x + P with P[t, 2i] = sin(t θ^(−2i/C)), P[t, 2i+1] = cos(t θ^(−2i/C)) (Vaswani 2017); any length.

    `interleaved=False` puts all sines before all cosines, as Marian and the tensor2tensor code do.
    """

    theta: float = 10000.0
    interleaved: bool = True

    def build(self, width: int) -> nn.Module:
        if width % 2:
            raise QkvError(f"sinusoidal positions need an even width, not {width}")
        return _Sinusoidal(self, width)


class _Sinusoidal(nn.Module):
    def __init__(self, spec: Sinusoidal, width: int) -> None:
        super().__init__()
        self.spec, self.room = spec, None

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        rate = torch.exp(-math.log(self.spec.theta) / x.shape[-1] * torch.arange(0, x.shape[-1], 2, device=x.device))
        angle = positions[..., None] * rate
        waves = (angle.sin(), angle.cos())
        table = torch.stack(waves, -1).flatten(-2) if self.spec.interleaved else torch.cat(waves, -1)
        return x + table.to(x.dtype)


@part("one-hot")
class OneHot(PositionEmbedding):
    """W [x; onehot(position)]: the position is concatenated as a vector of `size` entries and projected back to C."""

    size: int

    def build(self, width: int) -> nn.Module:
        return _OneHot(self, width)


class _OneHot(nn.Module):
    def __init__(self, spec: OneHot, width: int) -> None:
        super().__init__()
        self.spec, self.room = spec, spec.size
        self.project = Linear(width + spec.size, width, axes=("embed", "embed"))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        onehot = F.one_hot(positions.clamp(max=self.room - 1), self.room).to(x.dtype)
        return self.project(torch.cat((x, onehot.expand(*x.shape[:2], -1)), -1))
