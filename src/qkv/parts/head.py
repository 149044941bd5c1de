"""What stands at the end of a model: scores over a vocabulary, over classes, over the classes of each token; a vector.

Every head is called `head(x, table, valid)`: x (B T C) are the hidden vectors, `table` (V E) is the embedding's matrix,
which only a tied head reads, and `valid` (B T) marks the real tokens, which only a pooling head reads; None is all.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkv.errors import QkvError
from qkv.ops import cross_entropy
from qkv.ops.dropout import dropout
from qkv.ops.precision import wide
from qkv.parts.activation import activation
from qkv.parts.linear import Linear
from qkv.parts.norm import Norm
from qkv.spec import Spec, part, positive, share


class Output(Spec):
    """The slot `head` of a model."""

    def build(self, width: int, table: Tensor) -> "OutputModule":
        """The head of a model whose embedding's table (V E) is given."""
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class OutputModule(nn.Module):
    """What a head builds."""

    def forward(self, x: Tensor, table: Tensor, valid: Tensor | None = None) -> Tensor:
        raise AssertionError(f"{type(self).__name__} does not say what it computes")


@part("transform")
class Transform(Spec):
    """norm(act(W x + b)), to `width` features or as many as before: the last layer before a head (Devlin 2018)."""

    act: str = "gelu"
    norm: Norm | None = None
    width: int | None = None
    bias: bool = True

    def check(self) -> None:
        activation(self.act)
        positive(self, "width")
        if self.norm is not None and self.norm.over_batch:
            raise QkvError("a transform cannot normalise over the batch, whose padding it does not know")

    def build(self, width: int) -> "_Transform":
        return _Transform(self, width)


class _Transform(nn.Module):
    def __init__(self, spec: Transform, width: int) -> None:
        super().__init__()
        self.spec, self.act, self.width = spec, activation(spec.act), spec.width or width
        self.dense = Linear(width, self.width, bias=spec.bias, axes=("embed", "embed"))
        self.norm = spec.norm.build(self.width) if spec.norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dense(x))
        return x if self.norm is None else self.norm(x)


# --- over a vocabulary ---


@part("head")
class Head(Output):
    """logits = cap(scale · E transform(x) + b): … C → … V; cap(z) = c tanh(z / c) with a softcap c, else z.

    E is the embedding's own table when `tied` (Press 2017), else a matrix of its own.
    """

    tied: bool = False
    bias: bool = False
    transform: Transform | None = None
    scale: float | None = None
    softcap: float | None = None

    def check(self) -> None:
        positive(self, "softcap")

    def build(self, width: int, table: Tensor) -> "VocabularyHead":
        vocab, inner = table.shape
        last = self.transform.width or width if self.transform else width
        if self.tied and inner != last:
            raise QkvError(
                f"a tied head reads vectors as wide as the table, {inner}, not {last}: "
                f"untie it, or give it a transform of width {inner}"
            )
        return VocabularyHead(self, width, vocab)


class VocabularyHead(OutputModule):
    spec: Head

    def __init__(self, spec: Head, width: int, vocab: int) -> None:
        super().__init__()
        self.spec = spec
        self.transform = spec.transform.build(width) if spec.transform else None
        inner = width if self.transform is None else self.transform.width
        self.weight = None if spec.tied else nn.Parameter(torch.empty(vocab, inner))
        self.bias = nn.Parameter(torch.zeros(vocab)) if spec.bias else None
        if self.weight is not None:
            nn.init.xavier_uniform_(self.weight)

    def read(self, x: Tensor) -> Tensor:
        """What is multiplied with the table."""
        x = x if self.transform is None else self.transform(x)
        return x if self.spec.scale is None else x * self.spec.scale

    def forward(self, x: Tensor, table: Tensor, valid: Tensor | None = None) -> Tensor:
        z = F.linear(self.read(x), table if self.weight is None else self.weight, self.bias)
        return z if self.spec.softcap is None else torch.tanh(z / self.spec.softcap) * self.spec.softcap

    def loss(self, x: Tensor, table: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Σ over N vectors (N C) of their cross-entropy with N labels; only with a softcap are all logits kept."""
        if self.spec.softcap is not None:
            z = self(x, table)
            return F.cross_entropy(z.to(wide(z)), labels, reduction="sum", label_smoothing=smoothing)
        return cross_entropy.fused(
            self.read(x), table if self.weight is None else self.weight, labels, self.bias, smoothing
        )


# --- over a whole text ---

Take: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x: B T C, valid: B T) → B C."""


def first(x: Tensor, valid: Tensor) -> Tensor:
    return x[torch.arange(len(x), device=x.device), valid.int().argmax(1)]


def last(x: Tensor, valid: Tensor) -> Tensor:
    return first(x.flip(1), valid.flip(1))


def mean(x: Tensor, valid: Tensor) -> Tensor:
    return x.masked_fill(~valid[..., None], 0).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)


def largest(x: Tensor, valid: Tensor) -> Tensor:
    found = x.masked_fill(~valid[..., None], float("-inf")).amax(1)
    return found.masked_fill(~valid.any(1, keepdim=True), 0)  # of no tokens, as their mean


POOLS: dict[str, Take] = {"first": first, "last": last, "mean": mean, "max": largest}


@part("pool")
class Pool(Spec):
    """One vector of a text: its first or last token's, or the mean or the maximum over its tokens.

    Then transform(dropout(x)).
    """

    take: str = "first"
    transform: Transform | None = None
    dropout: float = 0.0

    def check(self) -> None:
        if self.take not in POOLS:
            raise QkvError(f"a pool takes the {', '.join(POOLS)} of the tokens, not {self.take!r}")
        share(self, "dropout")

    def build(self, width: int) -> "_Pool":
        return _Pool(self, width)


class _Pool(nn.Module):
    def __init__(self, spec: Pool, width: int) -> None:
        super().__init__()
        self.spec, self.take = spec, POOLS[spec.take]
        self.transform = spec.transform.build(width) if spec.transform else None
        self.width = width if self.transform is None else self.transform.width

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.take(x, x.new_ones(x.shape[:2], dtype=torch.bool) if valid is None else valid)
        x = dropout(x, self.spec.dropout) if self.training and self.spec.dropout else x
        return x if self.transform is None else self.transform(x)


@part("vector")
class Vector(Output):
    """The pooled vector of a text, of length 1 if `unit`: B T C → B C (Reimers 2019, Sentence-BERT)."""

    pool: Pool = Pool("mean")
    unit: bool = True

    def build(self, width: int, table: Tensor) -> OutputModule:
        return _Vector(self, width)


class _Vector(OutputModule):
    def __init__(self, spec: Vector, width: int) -> None:
        super().__init__()
        self.spec, self.pool = spec, spec.pool.build(width)

    def forward(self, x: Tensor, table: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.pool(x, valid)
        return F.normalize(x, dim=-1) if self.spec.unit else x


class Labelled(Output):
    """A head that scores classes; `labels` are their names."""

    labels: tuple[str, ...]


@part("classifier")
class Classifier(Labelled):
    """Scores of the classes of a text: W dropout(pool(x)) + b, B T C → B labels."""

    labels: tuple[str, ...]
    pool: Pool = Pool()
    bias: bool = True
    dropout: float = 0.0

    def check(self) -> None:
        share(self, "dropout")

    def build(self, width: int, table: Tensor) -> OutputModule:
        return _Classifier(self, width)


class _Classifier(OutputModule):
    def __init__(self, spec: Classifier, width: int) -> None:
        super().__init__()
        self.spec, self.pool = spec, spec.pool.build(width)
        self.out = Linear(self.pool.width, len(spec.labels), bias=spec.bias, axes=("label", "embed"))

    def forward(self, x: Tensor, table: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.pool(x, valid)
        return self.out(dropout(x, self.spec.dropout) if self.training and self.spec.dropout else x)


@part("tagger")
class Tagger(Labelled):
    """Scores of the classes of each token: W dropout(transform(x)) + b, B T C → B T labels."""

    labels: tuple[str, ...]
    transform: Transform | None = None
    bias: bool = True
    dropout: float = 0.0

    def check(self) -> None:
        share(self, "dropout")

    def build(self, width: int, table: Tensor) -> OutputModule:
        return _Tagger(self, width)


class _Tagger(OutputModule):
    def __init__(self, spec: Tagger, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.transform = spec.transform.build(width) if spec.transform else None
        inner = width if self.transform is None else self.transform.width
        self.out = Linear(inner, len(spec.labels), bias=spec.bias, axes=("label", "embed"))

    def forward(self, x: Tensor, table: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x if self.transform is None else self.transform(x)
        return self.out(dropout(x, self.spec.dropout) if self.training and self.spec.dropout else x)


@part("span")
class Span(Output):
    """How well an answer begins and ends at each token: W dropout(transform(x)) + b, B T C → B T 2 (Devlin 2018)."""

    transform: Transform | None = None
    dropout: float = 0.0

    def check(self) -> None:
        share(self, "dropout")

    def build(self, width: int, table: Tensor) -> OutputModule:
        return _Span(self, width)


class _Span(OutputModule):
    def __init__(self, spec: Span, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.transform = spec.transform.build(width) if spec.transform else None
        inner = width if self.transform is None else self.transform.width
        self.ends = Linear(inner, 2, bias=True, axes=("label", "embed"))

    def forward(self, x: Tensor, table: Tensor, valid: Tensor | None = None) -> Tensor:
        x = x if self.transform is None else self.transform(x)
        return self.ends(dropout(x, self.spec.dropout) if self.training and self.spec.dropout else x)
