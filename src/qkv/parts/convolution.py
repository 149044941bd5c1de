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

    def forward(self, x: Tensor, taps: Tensor | None = None, lengths: Tensor | None = None) -> Convolved:
        """x: B T D, rows packed left, of which lengths (B) are real; None is all."""
        T, k = x.shape[1], self.weight.shape[1]
        x = torch.cat(((self.no_taps(len(x)) if taps is None else taps).to(x.dtype), x), 1)
        w, y = self.weight.to(x.dtype), torch.zeros_like(x[:1, :1]) if self.bias is None else self.bias.to(x.dtype)
        for i in range(k):  # one pass a tap: forward and backward take a third of the library's depthwise convolution
            y = torch.addcmul(y, x[:, i : i + T], w[:, i])
        if lengths is None:
            return Convolved(y, x[:, T:].clone())  # a view would keep all of x
        last = lengths[:, None] + torch.arange(k - 1, device=x.device)
        return Convolved(y, x[torch.arange(len(x), device=x.device)[:, None], last])

    def extra_repr(self) -> str:
        width, size = self.weight.shape
        return f"{width} channels, {size} taps{'' if self.bias is None else ' + bias'}"
