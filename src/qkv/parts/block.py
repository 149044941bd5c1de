"""Residual branches, and the blocks that they form."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.errors import QkvError
from qkv.ops.dropout import dropout
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.norm import Norm
from qkv.spec import Spec, part, share
from qkv.state import Cell


class Gate(Spec):
    """Builds a module B T C → B T C at the end of a branch."""

    def build(self, width: int) -> nn.Module:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


@part("layer-scale")
class LayerScale(Gate):
    """λ ⊙ x, λ learned per feature and small at first (Touvron 2021)."""

    start: float = 1e-4

    def build(self, width: int) -> nn.Module:
        return _LayerScale(self, width)


class _LayerScale(nn.Module):
    def __init__(self, spec: LayerScale, width: int) -> None:
        super().__init__()
        self.spec, self.weight = spec, nn.Parameter(torch.full((width,), spec.start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


@part("branch")
class Branch(Spec):
    """x ← post(x + gate(dropout(out(f(pre(x)))))).

    `post` alone is the 2017 paper and BERT, `pre` alone GPT and ViT, `pre` and `out` the sandwich of Gemma 2. With
    `survival` p < 1 a training row keeps its branch with probability p, scaled by 1/p (stochastic depth, Huang 2016).
    """

    f: Mixer
    pre: Norm | None = None
    out: Norm | None = None
    post: Norm | None = None
    gate: Gate | None = None
    dropout: float = 0.0
    survival: float = 1.0

    def check(self) -> None:
        share(self, "dropout")
        if not 0 < self.survival <= 1:
            raise QkvError(f"the survival of a branch lies in (0, 1], not at {self.survival}")

    def build(self, width: int) -> "_Branch":
        return _Branch(self, width)


class _Branch(nn.Module):
    def __init__(self, spec: Branch, width: int) -> None:
        super().__init__()
        self.spec, self.f = spec, spec.f.build(width)
        self.pre = spec.pre.build(width) if spec.pre else None
        self.out = spec.out.build(width) if spec.out else None
        self.post = spec.post.build(width) if spec.post else None
        self.gate = spec.gate.build(width) if spec.gate else None

    def delta(self, x: Tensor, context: Context, cell: Cell | None) -> Tensor:
        """What the branch adds to the stream."""
        y = self.f(x if self.pre is None else self.pre(x, context), context, cell)
        if self.out is not None:
            y = self.out(y, context)
        if self.training and self.spec.dropout:
            y = dropout(y, self.spec.dropout)
        if self.gate is not None:
            y = self.gate(y)
        if self.training and self.spec.survival < 1:
            y = y * y.new_empty(len(y), 1, 1).bernoulli_(self.spec.survival) / self.spec.survival
        return y

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        x = x + self.delta(x, context, cell)
        return x if self.post is None else self.post(x, context)


@part("block", open="branches")
class Block(Spec):
    """An ordered set of branches, one after the other: `Block(attn=Branch(…), ffn=Branch(…))`."""

    branches: dict[str, Branch]

    if TYPE_CHECKING:

        def __init__(self, **branches: Branch) -> None: ...

    def check(self) -> None:
        if not self.branches:
            raise QkvError("a block needs a branch: Block(attn=Branch(…))")
        for name in self.branches:
            if not name.isidentifier() or hasattr(BlockModule, name) or name in ("pre", "spec", "training", "kind"):
                raise QkvError(f"{name!r} cannot name a branch")

    def build(self, width: int) -> "BlockModule":
        return BlockModule(self, width)


class BlockModule(nn.Module):
    def __init__(self, spec: Block, width: int) -> None:
        super().__init__()
        self.spec = spec
        for name, branch in spec.branches.items():
            self.add_module(name, branch.build(width))

    def branches(self) -> Iterator[tuple[str, _Branch]]:
        return ((name, module) for name, module in self.named_children() if isinstance(module, _Branch))

    def bodies(self) -> Iterator[tuple[str, Body]]:
        """What stands in each branch, by the branch's name."""
        return ((name, branch.f) for name, branch in self.branches())

    def new_cells(self, batch: int, room: int, given: Mapping[str, Tensor]) -> dict[str, Cell]:
        cells = {name: body.new_cell(batch, room, given) for name, body in self.bodies()}
        return {name: cell for name, cell in cells.items() if cell is not None}

    def forward(self, x: Tensor, context: Context, cells: Mapping[str, Cell]) -> Tensor:
        for name, branch in self.branches():
            x = branch(x, context.inside(name), cells.get(name))
        return x


@part("parallel", open="branches")
class Parallel(Block):
    """Branches that all read the same x and add up: x + Σ branch(pre(x)) (GPT-J; NeoX without a shared `pre`)."""

    branches: dict[str, Branch]
    pre: Norm | None = None

    if TYPE_CHECKING:

        def __init__(self, pre: Norm | None = None, **branches: Branch) -> None: ...

    def check(self) -> None:
        super().check()
        if any(branch.post for branch in self.branches.values()):
            raise QkvError("a branch of a parallel block has no stream of its own to normalise: leave out its post")

    def build(self, width: int) -> BlockModule:
        return ParallelModule(self, width)


class ParallelModule(BlockModule):
    def __init__(self, spec: Parallel, width: int) -> None:
        super().__init__(spec, width)
        self.pre = spec.pre.build(width) if spec.pre else None

    def forward(self, x: Tensor, context: Context, cells: Mapping[str, Cell]) -> Tensor:
        read = x if self.pre is None else self.pre(x, context)
        for name, branch in self.branches():
            x = x + branch.delta(read, context.inside(name), cells.get(name))
        return x
