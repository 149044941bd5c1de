"""Rotary positions."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts.position.position import Position, Positional
from qkv.parts.position.scaling import Scaling, spans
from qkv.spec import part

Rotation: TypeAlias = tuple[Tensor, Tensor]
"""cos and ±sin of each angle, 1|B 1 T K; the sign, − in the first half, saves negating x."""


@part("rotary")
class Rotary(Position):
    """Turns each pair (x_i, x_{i+K/2}) of a query or key by the angle t θ^(−2i/K), so that scores depend on distance.

    Su 2021 (RoFormer). `fraction` < 1 turns only the first part of each head, whose width is then K; `scaling` changes
    the rates θ^(−2i/K) for texts longer than those trained on.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    scaling: Scaling | None = None

    def check(self) -> None:
        if not 1 < self.theta < math.inf:
            raise QkvError(f"theta, by whose powers rotary waves grow longer, lies above 1, not at {self.theta}")
        if not 0 < self.fraction <= 1:
            raise QkvError(f"the rotary fraction lies in (0, 1], not at {self.fraction}")

    def build(self, heads: int, head_width: int) -> Positional:
        return _Rotary(self, head_width)


class _Rotary(Positional):
    spec: Rotary

    def __init__(self, spec: Rotary, head_width: int) -> None:
        super().__init__(spec)
        self.turned = int(head_width * spec.fraction)
        if self.turned % 2 or not self.turned:
            raise QkvError(f"rotary positions turn pairs, and {spec.fraction} of {head_width} is {self.turned} values")
        if spec.scaling is not None:
            spec.scaling.fits(self.turned)

    def table(self, positions: Tensor, context: Context, dtype: torch.dtype = torch.float32) -> Rotation:
        theta, scaling = self.spec.theta, self.spec.scaling
        at = positions[..., None].to(torch.float64 if dtype == torch.float64 else torch.float32)  # bf16 counts to 256
        if scaling is None:
            rates = 1 / spans(theta, self.turned, at)
        else:
            rates = scaling.rates(theta, self.turned, reached(at, context))
        angle = (at * rates)[:, None]
        cos, sin = angle.cos(), angle.sin()
        if scaling is not None and scaling.magnitude != 1:
            cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def rotate(self, x: Tensor, table: Rotation) -> Tensor:
        cos, sin = (wave.to(x.dtype) for wave in table)
        turned, rest = x[..., : self.turned], x[..., self.turned :]
        turned = torch.addcmul(turned * cos, turned.roll(self.turned // 2, -1), sin)
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def reached(at: Tensor, context: Context) -> Tensor:
    """Positions (1|B T 1) → 1|B 1 1: the length of each row when this pass is over; padding does not count."""
    valid = context.valid()
    real = at if valid is None else torch.where(valid[..., None], at, -1.0)
    return real.amax(1, keepdim=True) + 1
