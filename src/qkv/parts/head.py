"""From vectors to scores over a vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.ops import cross_entropy
from qkv.spec import Spec, part


@part("head")
class Head(Spec):
    """logits = x Eᵀ + b, E the embedding's own table when `tied` (Press 2017), else a matrix of its own."""

    tied: bool = False
    bias: bool = False

    def build(self, width: int, table: Tensor) -> "VocabularyHead":
        """The head of a model whose embedding's table (V E) is given."""
        vocab, inner = table.shape
        if self.tied and inner != width:
            raise QkvError(f"a tied head of a model {width} wide needs a table as wide, not {inner}: untie it")
        return VocabularyHead(self, width, vocab)


class VocabularyHead(nn.Module):
    """Called with the embedding's table, which it uses only when tied."""

    def __init__(self, spec: Head, width: int, vocab: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = None if spec.tied else nn.Parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.zeros(vocab)) if spec.bias else None
        if self.weight is not None:
            nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """… C → … vocabulary."""
        return F.linear(x, table if self.weight is None else self.weight, self.bias)

    def loss(self, x: Tensor, table: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Σ over N vectors (N C) of their cross-entropy with N labels, without keeping N × vocabulary logits."""
        return cross_entropy.fused(x, table if self.weight is None else self.weight, labels, self.bias, smoothing)
