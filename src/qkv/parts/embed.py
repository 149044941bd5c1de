"""From ids to vectors."""

import math

import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops.dropout import dropout
from qkv.parts.linear import Linear
from qkv.parts.norm import Norm
from qkv.parts.position.absolute import PositionEmbedding
from qkv.spec import Spec, part, positive, share


class Embedding(Spec):
    """Builds a module `(ids, context) → B T C` with `table`, the matrix that a tied head shares, and `room`."""

    def build(self, width: int, other: "TokenEmbedding | None" = None) -> "TokenEmbedding":
        """`other` is the source's embedding, where this is a target's."""
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


@part("tokens")
class Tokens(Embedding):
    """dropout(norm(E[id] (× √C) + position + segment)).

    `vocab=None` is set from the tokenizer when a recipe is run. `width` < C factorises the table (ALBERT, Lan 2019).
    Segments are read from the tensor `segments` (B T) of the call, or are all 0.
    """

    vocab: int | None = None
    width: int | None = None
    position: PositionEmbedding | None = None
    segments: int | None = None
    norm: Norm | None = None
    scaled: bool = False
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "vocab", "width", "segments")
        share(self, "dropout")

    def build(self, width: int, other: "TokenEmbedding | None" = None) -> "TokenEmbedding":
        if self.vocab is None:
            raise QkvError("the vocabulary's size is not set: give vocab, or run a recipe, which takes the tokenizer's")
        inner = self.width or width
        made = TokenEmbedding(self, width, inner, tokens=table(self.vocab, inner, inner**-0.5))
        if self.width is not None:
            made.project = Linear(inner, width, bias=True, axes=("embed", "embed"))
        return made


@part("tied-tokens")
class TiedTokens(Embedding):
    """dropout(norm(E[id] (× √C) + position + segment)), E the source's table (Press 2017).

    The target of an encoder-decoder with one vocabulary, where its positions or its norm are not the source's.
    """

    position: PositionEmbedding | None = None
    segments: int | None = None
    norm: Norm | None = None
    scaled: bool = False
    dropout: float = 0.0

    def check(self) -> None:
        positive(self, "segments")
        share(self, "dropout")

    def build(self, width: int, other: "TokenEmbedding | None" = None) -> "TokenEmbedding":
        if other is None or other.project is not None:
            raise QkvError(f"tied tokens share the table of a source that is {width} wide: give Tokens of their own")
        return TokenEmbedding(self, width, width, other=other)


class TokenEmbedding(nn.Module):
    def __init__(
        self,
        spec: Tokens | TiedTokens,
        width: int,
        inner: int,
        *,
        tokens: nn.Embedding | None = None,
        other: "TokenEmbedding | None" = None,
    ) -> None:
        super().__init__()
        self.spec, self.scale = spec, math.sqrt(width)
        self.tokens, self.other = tokens, [other]  # in a list, so that torch does not register it here as well
        self.position = spec.position.build(inner) if spec.position else None
        self.segments = table(spec.segments, inner, 0.02) if spec.segments else None
        self.norm = spec.norm.build(inner) if spec.norm else None
        self.project: Linear | None = None

    @property
    def lookup(self) -> nn.Embedding:
        """The rows of the tokens, its own or the other's."""
        owner = self if self.other[0] is None else self.other[0]
        assert owner.tokens is not None
        return owner.tokens

    @property
    def table(self) -> Tensor:
        return self.lookup.weight

    @property
    def room(self) -> int | None:
        """The longest sequence that it can place."""
        return getattr(self.position, "room", None)

    def forward(self, ids: Tensor, context: Context) -> Tensor:
        x = self.lookup(ids)
        if self.spec.scaled:
            x = x * self.scale
        if self.position is not None:
            x = self.position(x, context.positions)
        if self.segments is not None:
            given = "segments" in context.given
            x = x + (self.segments(context.packed("segments", (1,))) if given else self.segments.weight[0])
        if self.norm is not None:
            x = self.norm(x, context)
        if self.training and self.spec.dropout:
            x = dropout(x, self.spec.dropout)
        return x if self.project is None else self.project(x)


def table(size: int, width: int, std: float) -> nn.Embedding:
    embedding = nn.Embedding(size, width, _weight=torch.empty(size, width))
    nn.init.normal_(embedding.weight, std=std)
    return embedding
