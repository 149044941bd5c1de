"""A short causal convolution over time, as it stands inside recurrent mixers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Convolved:
    """What came out, `out` (B T D), and the inputs that the next tokens will still see, `taps` (B k−1 D)."""

    out: Tensor
    taps: Tensor


class ShortConvolution(nn.Module):
    """y_t = Σ_i w_i ⊙ x_{t−k+1+i} + b for i = 0 … k−1: each channel by itself, no token after t; weight: D k.

    Its state are the last k−1 real inputs of each row; before the first token they are zeros.
    """

    def __init__(self, width: int, size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, size))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def no_taps(self, batch: int) -> Tensor:
        """The state before the first token."""
        width, size = self.weight.shape
        return self.weight.new_zeros(batch, size - 1, width)

    def forward(
        self, x: Tensor, taps: Tensor | None = None, lengths: Tensor | None = None, ages: Tensor | None = None
    ) -> Convolved:
        """x: B T D, rows packed left, of which lengths (B) are real; None is all.

        `ages` (B T) says how many tokens of its own document stand before each token: it sees no others.
        """
        T, k = x.shape[1], self.weight.shape[1]
        preceded = precede(x, self.no_taps(len(x)) if taps is None else taps, lengths)
        w, y = self.weight.to(x.dtype), torch.zeros_like(x[:1, :1]) if self.bias is None else self.bias.to(x.dtype)
        for i in range(k):  # one pass a tap: forward and backward take a third of the library's depthwise convolution
            tap = preceded.all[:, i : i + T]
            if ages is not None:
                tap = tap.masked_fill((ages < k - 1 - i)[..., None], 0)
            y = torch.addcmul(y, tap, w[:, i])
        return Convolved(y, preceded.last)

    def extra_repr(self) -> str:
        width, size = self.weight.shape
        return f"{width} channels, {size} taps{'' if self.bias is None else ' + bias'}"


@dataclass(frozen=True, eq=False)
class Preceded:
    """Inputs with those before them, `all` (B n+T D), and the last n real ones, `last` (B n D)."""

    all: Tensor
    last: Tensor


def precede(x: Tensor, before: Tensor, lengths: Tensor | None) -> Preceded:
    """x: B T D, of which lengths (B) are real, after the inputs `before` (B n D)."""
    n, T, x = before.shape[1], x.shape[1], torch.cat((before.to(x.dtype), x), 1)
    if lengths is None:
        return Preceded(x, x[:, T:].clone())  # a view would keep all of x
    last = lengths[:, None] + torch.arange(n, device=x.device)
    return Preceded(x, x[torch.arange(len(x), device=x.device)[:, None], last])
