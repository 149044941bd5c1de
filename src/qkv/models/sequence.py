"""One stack over one sequence: a decoder with the mask Causal(), an encoder with Full()."""

from torch import Tensor

from qkv.context import Tap
from qkv.errors import QkvError
from qkv.masks import Causal, Mask
from qkv.models.model import Model, Module, new_state, run
from qkv.parts.embed import Tokens
from qkv.parts.head import Head
from qkv.parts.norm import Norm
from qkv.parts.stack import Stack
from qkv.spec import part
from qkv.state import State


@part("sequence")
class Sequence(Model):
    """head(norm(stack(embed(ids)))). GPT and BERT differ in the mask and in where the norms stand."""

    width: int
    embed: Tokens
    stack: Stack
    mask: Mask = Causal()
    norm: Norm | None = None
    head: Head | None = None

    def build(self) -> "SequenceModel":
        return SequenceModel(self)


class SequenceModel(Module):
    spec: Sequence

    def __init__(self, spec: Sequence) -> None:
        super().__init__()
        self.spec = spec
        self.embed = spec.embed.build(spec.width)
        self.stack = spec.stack.build(spec.width)
        self.norm = spec.norm.build(spec.width) if spec.norm else None
        self.head = spec.head.build(spec.width, self.embed.table) if spec.head else None

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
        parts = self.embed, self.stack, self.norm
        return run(
            ids, parts, mask=self.spec.mask, path="stack",
            given=given, valid=valid, lengths=lengths, state=state, tap=tap,
        )  # fmt: skip

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
        """ids B T → logits B T V.

        `valid` (B T) marks real tokens wherever they stand, or `lengths` (B) says that rows are packed left. With a
        `state` the ids continue what it has seen. Masks and embeddings read further tensors by name (`segments`, …).
        """
        if self.head is None:
            raise QkvError("this model has no head; take model.hidden(ids), or give its spec one")
        x = self.hidden(ids, valid=valid, lengths=lengths, state=state, tap=tap, **given)
        return self.head(x, self.embed.table)

    def new_state(self, batch: int, room: int, **given: Tensor) -> State:
        """An empty state for `batch` rows of up to `room` tokens."""
        return new_state(self.stack, self.spec.mask, batch, room, self.embed, given)
