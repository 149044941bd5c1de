"""Mixing tokens without attention or memory: by a network along time, and by the Fourier transform."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops.precision import as_given, wide
from qkv.parts.activation import activation
from qkv.parts.linear import Linear
from qkv.parts.mixers.body import Body, Mixer, WholeBody
from qkv.spec import part


@part("token-mixing")
class TokenMixing(Mixer):
    """Y = W₂ act(W₁ X + b₁) + b₂, X: T × C, W₁: hidden × T: a feed-forward along time (Tolstikhin 2021, MLP-Mixer).

    The number of `tokens` T is fixed; where a row has fewer, zeros stand for the others, and more are refused.
    """

    tokens: int
    hidden: int
    act: str = "gelu"

    def check(self) -> None:
        activation(self.act)
        if self.tokens < 1 or self.hidden < 1:
            raise QkvError(f"tokens and hidden are each at least 1, not {self.tokens} and {self.hidden}")

    @property
    def incremental(self) -> bool:
        return False

    def build(self, width: int) -> Body:
        return _TokenMixing(self)


class _TokenMixing(WholeBody):
    spec: TokenMixing

    def __init__(self, spec: TokenMixing) -> None:
        super().__init__()
        self.spec, self.act = spec, activation(spec.act)
        self.up = Linear(spec.tokens, spec.hidden, bias=True, axes=("hidden", "tokens"))
        self.down = Linear(spec.hidden, spec.tokens, bias=True, axes=("tokens", "hidden"))

    def mix(self, x: Tensor, context: Context) -> Tensor:
        tokens, T, valid = self.spec.tokens, x.shape[1], context.valid()
        if tokens < T:
            raise QkvError(f"a TokenMixing of {tokens} tokens was given {T}: cut the text, or build it for as many")
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        return self.down(self.act(self.up(F.pad(x.mT, (0, tokens - T))))).mT[:, :T]


@part("fourier")
class Fourier(Mixer):
    """y = Re F_T(F_C(x)), the discrete Fourier transform over channels, then time (Lee-Thorp 2021, FNet).

    It learns nothing. Each row is transformed over its own length.
    """

    @property
    def incremental(self) -> bool:
        return False

    def build(self, width: int) -> Body:
        return _Fourier(self)


class _Fourier(WholeBody):
    def __init__(self, spec: Fourier) -> None:
        super().__init__()
        self.spec = spec

    def mix(self, x: Tensor, context: Context) -> Tensor:
        with as_given(x):
            waves = torch.fft.fft(x.to(wide(x)))
            if context.lengths is None:
                return torch.fft.fft(waves, dim=1).real.to(x.dtype)
            y = torch.zeros_like(x)
            for n in context.lengths[context.lengths > 0].unique().tolist():
                rows = context.lengths == n
                y[rows, :n] = torch.fft.fft(waves[rows, :n], dim=1).real.to(x.dtype)
            return y
