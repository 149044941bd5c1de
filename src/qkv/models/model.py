"""What every model has, and the one pass through embedding, stack and norm."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn

from qkv.context import Context, Recording, Tap, pack, take
from qkv.errors import QkvError
from qkv.masks import Mask
from qkv.parts.embed import TokenEmbedding
from qkv.parts.stack import _Stack
from qkv.spec import Spec
from qkv.state import State


class Model(Spec):
    """The spec of a whole model."""

    def build(self) -> "Module":
        """The model with fresh weights, in training mode."""
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Module(nn.Module):
    """A model; it keeps the spec that it was built from."""

    spec: Model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def count(self) -> int:
        """The number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def recompute(self, on: bool = True) -> Self:
        """Gradient checkpointing in every stack: less memory, about a third more time, the same gradients."""
        for module in self.modules():
            if isinstance(module, _Stack):
                module.recompute = on
        return self


def run(
    ids: Tensor,
    parts: tuple[TokenEmbedding, _Stack, nn.Module | None],
    *,
    mask: Mask,
    path: str,
    given: Mapping[str, Tensor],
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
    embed, stack, norm = parts
    if ids.dim() != 2:
        raise QkvError(f"ids have the shape (batch, tokens), not {tuple(ids.shape)}")
    order, T = None, ids.shape[1]
    if valid is not None:
        if lengths is not None or valid.shape != ids.shape:
            raise QkvError(f"give either valid, of the shape {tuple(ids.shape)} of the ids, or lengths")
        order, lengths = pack(valid)
        ids = take(ids, order)
    if embed.room is not None and (0 if state is None else state.most) + T > embed.room:
        raise QkvError(f"{T} tokens are too many: the model has {embed.room} positions; shorten the text")
    recording = Recording(tap, order) if tap is not None else None
    positions = torch.arange(T, device=ids.device)[None] if state is None else state.positions(T)
    start = 0 if state is None else state.start
    given = {**(state.given if state is not None else {}), **given}
    context = Context(positions, mask, start, lengths, order, given, recording=recording, path=path)
    if state is not None:
        state.reserve(T)
        mask.refuse(context, T)
    x = stack(embed(ids, context), context, state.cells if state is not None else None)
    if norm is not None:
        x = norm(x, context)
    if state is not None:
        state.advance(T, lengths)
    if recording is not None:
        recording.sealed = True
    return x if order is None or not unpack else take(x, order.argsort(1))


def new_state(
    stack: _Stack, mask: Mask, batch: int, room: int, embed: TokenEmbedding, given: Mapping[str, Tensor]
) -> State:
    """An empty state for `batch` rows of up to `room` tokens; what is given stays with it, but for the memories."""
    if not mask.incremental:
        raise QkvError(f"a model with the mask {mask!r} sees tokens to come and keeps no state; use Causal()")
    if embed.room is not None and room > embed.room:
        raise QkvError(f"room for {room} tokens was asked for; the model has {embed.room} positions")
    state = State(stack.new_cells(batch, room, given), batch, room, embed.table.device)
    state.given = {name: value for name, value in given.items() if value.dim() < 3}
    return state
