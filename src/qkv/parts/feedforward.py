"""Position-wise feed-forward networks."""

from torch import Tensor

from qkv.context import Context
from qkv.parts.activation import activation
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer
from qkv.spec import part, positive
from qkv.state import Cell


@part("feedforward")
class FeedForward(Mixer):
    """W₂ act(W₁ x + b₁) + b₂ on each token by itself, W₁: hidden × C (Vaswani 2017); a 1×1 convolution over time."""

    hidden: int
    act: str = "relu"
    bias: bool = True

    def check(self) -> None:
        activation(self.act)
        positive(self, "hidden")

    def build(self, width: int) -> Body:
        return _FeedForward(self, width)


class _FeedForward(Body):
    def __init__(self, spec: FeedForward, width: int) -> None:
        super().__init__()
        self.spec, self.act = spec, activation(spec.act)
        self.up = Linear(width, spec.hidden, bias=spec.bias, axes=("hidden", "embed"))
        self.down = Linear(spec.hidden, width, bias=spec.bias, axes=("embed", "hidden"))

    def forward(self, x: Tensor, context: Context | None = None, cell: Cell | None = None) -> Tensor:
        return self.down(self.act(self.up(x)))


@part("gated")
class Gated(Mixer):
    """W₂ (act(W_g x) ⊙ W₁ x): sigmoid is GLU, silu SwiGLU, gelu GeGLU (Shazeer 2020)."""

    hidden: int
    act: str = "silu"
    bias: bool = False

    def check(self) -> None:
        activation(self.act)
        positive(self, "hidden")

    def build(self, width: int) -> Body:
        return _Gated(self, width)


class _Gated(Body):
    def __init__(self, spec: Gated, width: int) -> None:
        super().__init__()
        self.spec, self.act = spec, activation(spec.act)
        self.gate = Linear(width, spec.hidden, bias=spec.bias, axes=("hidden", "embed"))
        self.up = Linear(width, spec.hidden, bias=spec.bias, axes=("hidden", "embed"))
        self.down = Linear(spec.hidden, width, bias=spec.bias, axes=("embed", "hidden"))

    def forward(self, x: Tensor, context: Context | None = None, cell: Cell | None = None) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))
