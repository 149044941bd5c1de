"""A recurrence from either side."""

import dataclasses as dc

import torch
from torch import Tensor

from qkv.context import Context, take
from qkv.errors import QkvError
from qkv.parts.mixers.body import Body, Mixer, WholeBody
from qkv.spec import part


@part("bidirectional")
class Bidirectional(Mixer):
    """y = f(x) + reversed(g(reversed(x))), g of the same form as f with weights of its own (Schuster 1997).

    For encoders: `Bidirectional(LSTM(64))`. Each row is reversed within its own length. Where f and g project their
    states, the sum is the product of both states, side by side, with one matrix, as a BiLSTM is usually written.
    """

    f: Mixer

    def check(self) -> None:
        if not self.f.incremental:
            raise QkvError(f"{type(self.f).__name__} sees both sides already: let it stand without Bidirectional")

    @property
    def incremental(self) -> bool:
        return False

    def build(self, width: int) -> Body:
        return _Bidirectional(self, width)


class _Bidirectional(WholeBody):
    def __init__(self, spec: Bidirectional, width: int) -> None:
        super().__init__()
        self.spec, self.ahead, self.back = spec, spec.f.build(width), spec.f.build(width)
        self.ahead.view = self.back.view = 0

    def mix(self, x: Tensor, context: Context) -> Tensor:
        turn = reversal(len(x), x.shape[1], context.lengths, x.device)
        order = turn if context.order is None else take(context.order, turn)
        # a tap hears nothing of the way back, whose tokens stand in another order
        turned = dc.replace(context, order=order, recording=None)
        back = take(self.one(self.back, take(x, turn), turned), turn)
        return self.one(self.ahead, x, context.inside("ahead")) + back

    def one(self, body: Body, x: Tensor, context: Context) -> Tensor:
        """A body with a view of its own."""
        return body(x, dc.replace(context, views=[body.prepare(context, None, x.shape[1])]))


def reversal(rows: int, T: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """B T: which token comes to each place when rows are reversed within their lengths, padding staying put."""
    steps = torch.arange(T, device=device).expand(rows, -1)
    if lengths is None:
        return steps.flip(1)
    return torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)
