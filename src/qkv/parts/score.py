"""How alike a query and a key are: the slot `score` of an attention."""

import torch
from torch import Tensor, nn

from qkv.spec import Spec, part, positive


class Score(Spec):
    """Builds a module `(q: B H T K, k: B H S K) → scores B H T S`."""

    def build(self, heads: int, head_width: int) -> "Scoring":
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Scoring(nn.Module):
    """What a score builds."""

    dot: "ScaledDot | None" = None
    """Set where the score is a scaled dot product, for which there are fast forms; `forward` is then never called."""


@part("scaled-dot")
class ScaledDot(Score):
    """q·k × scale, scale K^(−1/2) unless given (Vaswani 2017; 1.0 is Luong's dot); softcap c: s ← c tanh(s / c)."""

    scale: float | None = None
    softcap: float | None = None

    def check(self) -> None:
        positive(self, "softcap")

    def build(self, heads: int, head_width: int) -> Scoring:
        scoring = Scoring()
        scoring.dot = self
        return scoring


@part("additive")
class Additive(Score):
    """vᵀ tanh(q + k), a v for each head; the matrices W and U of Bahdanau 2014 are the attention's own projections."""

    def build(self, heads: int, head_width: int) -> Scoring:
        return _Additive(heads, head_width)


class _Additive(Scoring):
    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.empty(heads, head_width))
        nn.init.normal_(self.v, std=head_width**-0.5)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.einsum("bhtsk,hk->bhts", torch.tanh(q[:, :, :, None] + k[:, :, None]), self.v.to(q.dtype))
