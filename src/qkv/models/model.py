"""What every model has, and the one pass through embedding, stack and norm."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from qkv.context import Context, Recording, Tap, pack, take
from qkv.errors import QkvError
from qkv.masks import Mask
from qkv.ops.sample import Scores
from qkv.ops.sample.scores import Kernels
from qkv.parts.embed import TokenEmbedding
from qkv.parts.head import OutputModule, VocabularyHead
from qkv.parts.stack import StackModule
from qkv.spec import Spec
from qkv.state import Cell, State


class Model(Spec):
    """The spec of a whole model."""

    def build(self) -> "Module":
        """The model with fresh weights, in training mode."""
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Program(Protocol):
    """Takes the place of a pass from ids to hidden vectors, when nothing is learned or tapped (`native`)."""

    def __call__(self, ids: Tensor, lengths: Tensor | None, state: State | None, given: Mapping[str, Tensor]) -> Tensor:
        """ids B T, rows packed left → B T C."""

    def new_cells(self, batch: int, room: int, given: Mapping[str, Tensor]) -> list[dict[str, Cell]]:
        """The cells of a state."""


class Scorer(Protocol):
    """Takes the place of a head over a vocabulary."""

    kernels: Kernels
    """What looks at the scores that it makes."""

    def __call__(self, x: Tensor) -> Tensor:
        """… C → … V."""


class Wiring(NamedTuple):
    """What a pass from ids to hidden vectors goes through."""

    embed: TokenEmbedding
    stack: StackModule
    norm: nn.Module | None
    mask: Mask
    path: str
    """Where a tap finds the stack."""
    program: Program | None = None


class Module(nn.Module):
    """A model of token sequences; it keeps the spec that it was built from."""

    spec: Model
    head: OutputModule | None
    origin: Any = None
    """Where it was loaded from, for its way back (`checkpoints`)."""

    def __init__(self) -> None:
        super().__init__()
        self.programs: dict[str, Program] = {}
        """What runs in the place of its passes, by their paths, while it is not trained."""
        self.scores: Scorer | None = None
        """What runs in the place of its head over a vocabulary."""

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a pickle, has no programs: they hold addresses of this process."""
        return {**self.__dict__, "programs": {}, "scores": None}

    @property
    def wiring(self) -> Wiring:
        """The pass that the ids of `forward` take."""
        raise AssertionError(f"{type(self).__name__} does not say how it is wired")

    def wired(self, embed: TokenEmbedding, stack: StackModule, norm: nn.Module | None, mask: Mask, path: str) -> Wiring:
        """A pass, with the program that runs in its place."""
        return Wiring(embed, stack, norm, mask, path, None if self.training else self.programs.get(path))

    def hidden(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
        tap: Tap | None = None,
        **given: Tensor,
    ) -> Tensor:
        """ids B T → B T C, before the head; arguments as `forward`."""
        return run(ids, self.wiring, given, valid=valid, lengths=lengths, state=state, tap=tap)

    def forward(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        state: State | None = None,
        tap: Tap | None = None,
        **given: Tensor,
    ) -> Tensor:
        """ids B T → what the head makes of them: logits B T V over a vocabulary, or scores of classes, or a vector.

        `valid` (B T) marks real tokens wherever they stand, or `lengths` (B) says that rows are packed left. With a
        `state` the ids continue what it has seen. Further tensors are read by name: `segments`, `prefix`, a memory.
        """
        x = self.hidden(ids, valid=valid, lengths=lengths, state=state, tap=tap, **given)
        if lengths is not None:
            valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return self.logits(x, valid)

    def logits(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """What the head makes of hidden vectors B T C, of which `valid` (B T) are real; over a vocabulary … C → … V."""
        if self.scores is not None and not self.training:
            return self.scores(x)
        if self.head is None:
            raise QkvError("this model has no head: take model.hidden(ids), or give its spec one")
        return self.head(self.typed(x), self.wiring.embed.table, valid)

    def typed(self, x: Tensor) -> Tensor:
        """Hidden vectors in the type of the head's weights: programs give fp32, whatever that is."""
        if self.head is None or not self.programs or self.training:
            return x
        return x.to(next((weight.dtype for weight in self.head.parameters()), self.wiring.embed.table.dtype))

    def choices(self, x: Tensor) -> Scores:
        """What the head makes of hidden vectors (N C), to choose from: N V, in fp32."""
        return Scores(self.logits(x).float(), None if self.scores is None else self.scores.kernels)

    def loss(self, x: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Σ over N hidden vectors (N C) of their cross-entropy with N labels of the vocabulary."""
        if not isinstance(self.head, VocabularyHead):
            raise QkvError("this model has no head over a vocabulary, from which it could learn tokens: give it a Head")
        return self.head.loss(self.typed(x), self.wiring.embed.table, labels, smoothing)

    def new_state(self, batch: int, room: int, **given: Tensor) -> State:
        """An empty state for `batch` rows of up to `room` tokens; memories are projected here, once."""
        embed, stack, _, mask, _, program = self.wiring
        if not mask.incremental:
            raise QkvError(f"a model with the mask {mask!r} sees tokens to come and keeps no state; use Causal()")
        if embed.room is not None and room > embed.room:
            raise QkvError(f"room for {room} tokens was asked for; the model has {embed.room} positions")
        cells = (stack if program is None else program).new_cells(batch, room, given)
        state = State(cells, batch, room, self.device)
        state.owner = program
        state.given = {name: value for name, value in given.items() if value.dim() < 3}  # all but the memories
        return state

    @contextmanager
    def evaluating(self) -> Iterator[Self]:
        """A model that is trained is in evaluation mode meanwhile; then each part is in the mode that it was in."""
        training = [module for module in self.modules() if module.training] if self.training else []
        if training:
            self.eval()
        try:
            yield self
        finally:
            for module in training:
                module.training = True

    @property
    def positions(self) -> int | None:
        """The longest sequence that it can read; None where there is no bound."""
        rooms = [embed.room for embed in self.modules() if isinstance(embed, TokenEmbedding) and embed.room is not None]
        return min(rooms, default=None)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def count(self) -> int:
        """The number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def recompute(self, on: bool = True) -> Self:
        """Gradient checkpointing in every stack: less memory, about a third more time, the same gradients."""
        for module in self.modules():
            if isinstance(module, StackModule):
                module.recompute = on
        return self


def run(
    ids: Tensor,
    wiring: Wiring,
    given: Mapping[str, Tensor],
    *,
    valid: Tensor | None = None,
    lengths: Tensor | None = None,
    state: State | None = None,
    tap: Tap | None = None,
    unpack: bool = True,
) -> Tensor:
    """ids B T → B T C: pack the rows left, embed, run the stack, normalise, advance the state, unpack.

    `valid` (B T) marks the real tokens wherever they stand; `lengths` (B) says that rows are packed left already.
    A memory stays packed (`unpack=False`).
    """
    embed, program = wiring.embed, wiring.program
    if ids.dim() != 2:
        raise QkvError(f"ids have the shape (batch, tokens), not {tuple(ids.shape)}")
    order, T = None, ids.shape[1]
    if lengths is not None and (lengths.shape != ids.shape[:1] or beyond(lengths, 0, T)):
        raise QkvError(f"lengths are how many of the {T} ids of each of {len(ids)} rows are real; found {lengths}")
    if valid is not None:
        if lengths is not None or valid.shape != ids.shape:
            raise QkvError(f"give either valid, of the shape {tuple(ids.shape)} of the ids, or lengths")
        order, lengths = pack(valid)
        ids = take(ids, order)
    if embed.room is not None and (0 if state is None else state.most) + T > embed.room:
        raise QkvError(f"{T} tokens are too many: the model has {embed.room} positions; shorten the text")
    if state is not None:
        if len(ids) != len(state.lengths):
            raise QkvError(f"the state is of {len(state.lengths)} rows, and the ids are of {len(ids)}")
        if state.owner is not program:
            raise QkvError("this state is of other passes: make another with new_state after qkv.fast and qkv.slow")
        state.reserve(T)
        given = {**state.given, **given}
    if program is None:
        x = passed(ids, wiring, lengths, order, given, state, tap)
    elif tap is not None:
        raise QkvError("a native program cannot be looked into: qkv.slow(model) gives its passes back to torch")
    else:
        if "segments" in given and order is not None:
            given = {**given, "segments": take(given["segments"], order)}
        x = program(ids, lengths, state, given)
    if state is not None:
        state.advance(T, lengths)
    return x if order is None or not unpack else take(x, order.argsort(1))


def beyond(numbers: Tensor, least: int, most: int) -> bool:
    """Whether one lies outside; asked where the answer is at hand, and no compiler would have to stop for it."""
    if not numbers.is_cpu or torch.compiler.is_compiling() or not numbers.numel():
        return False
    return not least <= int(numbers.min()) <= int(numbers.max()) <= most


def passed(
    ids: Tensor, wiring: Wiring, lengths: Tensor | None, order: Tensor | None, given: Mapping[str, Tensor],
    state: State | None, tap: Tap | None,
) -> Tensor:  # fmt: skip
    """The pass itself, by torch."""
    T, recording = ids.shape[1], Recording(tap, order) if tap is not None else None
    if beyond(ids, 0, most := len(wiring.embed.table) - 1):
        raise QkvError(f"ids lie between 0 and {most}; found {int(ids.min())} and {int(ids.max())}")
    positions = torch.arange(T, device=ids.device)[None] if state is None else state.positions(T)
    start = 0 if state is None else state.start
    context = Context(positions, wiring.mask, start, lengths, order, given, recording=recording, path=wiring.path)
    if state is not None:
        wiring.mask.refuse(context, T)
    x = wiring.embed(ids, context)
    if T:
        x = wiring.stack(x, context, None if state is None else state.cells)
    if wiring.norm is not None:
        x = wiring.norm(x, context)
    if recording is not None:
        recording.sealed = True
    return x
