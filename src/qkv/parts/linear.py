"""The one linear layer."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Axes: TypeAlias = tuple[str, str]
"""The logical names of a weight's rows (outputs) and columns (inputs): embed, heads, hidden, vocab, expert."""


class Linear(nn.Module):
    """y = x Wᵀ + b, plus what the adapters add; x: … C → … O, W: O C.

    Two seams let the same layer serve every use without a line in any model. The *store*: `weight` may be a tensor
    subclass that keeps its numbers packed, since all arithmetic on it is this one product. The *adapters*: named
    modules C → O whose outputs are added (LoRA). `axes` says what the rows and columns mean, for sharding.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, axes: Axes = ("hidden", "embed")) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.adapters = nn.ModuleDict()
        self.axes = axes
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        for adapter in self.adapters.values():
            y = y + adapter(x)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} → {self.weight.shape[0]}{'' if self.bias is None else ' + bias'}"
