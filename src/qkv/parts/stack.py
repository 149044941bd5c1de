"""A stack of blocks."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts.block import Block, BlockModule
from qkv.parts.mixers.body import Body
from qkv.parts.position.position import Position, SharedPosition
from qkv.spec import Spec, part
from qkv.state import Cell


@part("stack")
class Stack(Spec):
    """`depth` layers that repeat a pattern of blocks: hybrids, alternating windows, experts in every other layer.

    `use=(0, 0, 1, 1)` names the module of each executed layer (ALBERT's sharing); `shared` holds positions that
    several layers name (`Attention(position=Shared("relative"))`). Paths see the layers themselves, `stack.3.attn.f`:
    editing one of them unrolls the pattern as far as it must.
    """

    pattern: tuple[Block, ...] | Block
    depth: int
    use: tuple[int, ...] | None = None
    shared: dict[str, Position] | None = None

    def check(self) -> None:
        if self.depth < 1 or not self.blocks:
            raise QkvError(f"a stack needs at least one block and one layer, not {self.depth}")
        if self.use is not None and (len(self.use) != self.depth or sorted(set(self.use)) != list(range(self.modules))):
            raise QkvError(f"use names the module of each of the {self.depth} layers, from 0 and without gaps")

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (self.pattern,) if isinstance(self.pattern, Block) else self.pattern

    @property
    def modules(self) -> int:
        """How many different layers there are."""
        return self.depth if self.use is None else max(self.use) + 1

    @property
    def layers(self) -> list[Block]:
        """The spec of each module, the pattern unrolled."""
        return [self.blocks[n % len(self.blocks)] for n in range(self.modules)]

    def children(self) -> dict[str, Any]:
        others = {"depth": self.depth, "use": self.use, "shared": self.shared}
        return {**{str(n): block for n, block in enumerate(self.layers)}, **others}

    def with_children(self, children: Mapping[str, Any]) -> Self:
        layers = [children[str(n)] for n in range(self.modules)]
        pattern = rolled(layers) if layers != self.layers else self.pattern
        return type(self)(pattern, **{name: children[name] for name in ("depth", "use", "shared")})

    def build(self, width: int) -> "StackModule":
        return StackModule(self, width)


def rolled(layers: Sequence[Block]) -> tuple[Block, ...] | Block:
    """The shortest pattern that repeats to these layers."""
    for period in range(1, len(layers) + 1):
        if all(layer == layers[n % period] for n, layer in enumerate(layers)):
            return layers[0] if period == 1 else tuple(layers[:period])
    raise AssertionError("a stack has at least one layer")


class StackModule(nn.Module):
    """Its children are the layers, '0', '1', …, and `shared`."""

    recompute = False
    """Gradient checkpointing: keep only each layer's input and compute the rest again in the backward pass."""

    def __init__(self, spec: Stack, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.use = spec.use or tuple(range(spec.depth))
        for n, block in enumerate(spec.layers):
            self.add_module(str(n), block.build(width))
        self.shared = nn.ModuleDict()
        shapes: dict[str, tuple[int, int]] = {}
        for module in self.modules():
            if isinstance(module, SharedPosition):
                module.bind(spec.shared or {}, self.shared, shapes)
        self.prepares = self.assign_views()

    def layer(self, n: int) -> BlockModule:
        """The module that runs at execution position n."""
        block = self._modules[str(self.use[n])]
        assert isinstance(block, BlockModule)
        return block

    def assign_views(self) -> list[tuple[int, str]]:
        """Number the distinct looks; each is prepared by the first body that has it: (execution position, branch)."""
        numbers: dict[Any, int] = {}
        prepares: list[tuple[int, str]] = []
        for n in range(len(self.use)):
            for name, body in self.layer(n).bodies():
                look = body.look()
                if look is None:
                    continue
                if look not in numbers:
                    numbers[look] = len(prepares)
                    prepares.append((n, name))
                body.view = numbers[look]
        return prepares

    def body(self, n: int, name: str) -> Body:
        return dict(self.layer(n).bodies())[name]

    def new_cells(self, batch: int, room: int, given: Mapping[str, Tensor]) -> list[dict[str, Cell]]:
        return [self.layer(n).new_cells(batch, room, given) for n in range(len(self.use))]

    def forward(self, x: Tensor, context: Context, cells: Sequence[Mapping[str, Cell]] | None = None) -> Tensor:
        cells = cells if cells is not None else [{}] * len(self.use)
        context.views = [
            self.body(n, name).prepare(context, cells[n].get(name), x.shape[1]) for n, name in self.prepares
        ]
        for n in range(len(self.use)):
            layer, inside = self.layer(n), context.inside(str(n))
            if self.recompute and self.training:
                again = partial(around, layer)
                x = checkpoint(layer, x, inside, cells[n], use_reentrant=False, context_fn=again)
            else:
                x = layer(x, inside, cells[n])
            inside.emit("out", x)
        return x


def around(layer: nn.Module) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """What stands around a layer's first run, and around its second."""
    return contextlib.nullcontext(), Uncounted(layer)


class Uncounted(contextlib.AbstractContextManager[None]):
    """The layer's buffers stay as they are, however often: a batch that runs again has been counted."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        self.before = [(buffer, buffer.clone()) for buffer in self.layer.buffers()]

    def __exit__(self, *fault: object) -> None:
        for buffer, kept in self.before:
            buffer.data.copy_(kept)  # which autograd, in the midst of its work, need not know
