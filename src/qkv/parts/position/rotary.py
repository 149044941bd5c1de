"""Rotary positions."""

from typing import TypeAlias

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.parts.position.position import Position, Positional
from qkv.spec import part

Rotation: TypeAlias = tuple[Tensor, Tensor]


@part("rotary")
class Rotary(Position):
    """Turns each pair (x_i, x_{i+K/2}) of a query or key by the angle t θ^(−2i/K), so that scores depend on distance.

    Su 2021 (RoFormer). `fraction` < 1 turns only the first part of each head (GPT-NeoX).
    """

    theta: float = 10000.0
    fraction: float = 1.0

    def check(self) -> None:
        if not 0 < self.fraction <= 1:
            raise QkvError(f"the rotary fraction lies in (0, 1], not at {self.fraction}")

    def build(self, heads: int, head_width: int) -> Positional:
        return _Rotary(self, head_width)


class _Rotary(Positional):
    spec: Rotary

    def __init__(self, spec: Rotary, head_width: int) -> None:
        super().__init__(spec)
        self.turned = int(head_width * spec.fraction) // 2 * 2

    def table(self, positions: Tensor) -> Rotation:
        steps = torch.arange(0, self.turned, 2, device=positions.device)
        angle = positions[:, None, :, None].float() * self.spec.theta ** -(steps / self.turned)
        angle = torch.cat((angle, angle), -1)
        return angle.cos(), angle.sin()

    def rotate(self, x: Tensor, table: Rotation) -> Tensor:
        cos, sin = (wave.to(x.dtype) for wave in table)
        turned, rest = x[..., : self.turned], x[..., self.turned :]
        a, b = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-b, a), -1) * sin
        return torch.cat((turned, rest), -1) if rest.shape[-1] else turned
