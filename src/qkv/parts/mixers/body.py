"""The one call of whatever stands in a branch."""

from collections.abc import Hashable, Mapping

from torch import Tensor, nn

from qkv.context import Context, View
from qkv.errors import QkvError
from qkv.spec import Spec
from qkv.state import Cell


class Mixer(Spec):
    """Describes what stands in a branch: it mixes tokens, or the features of each token."""

    @property
    def incremental(self) -> bool:
        """Whether a cache can serve it: no output knows a later token, unless the mask lets it."""
        return True

    def build(self, width: int) -> "Body":
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


class Body(nn.Module):
    """`forward(x, context, cell=None)`: B T C → B T C. The other methods have defaults for a body without memory."""

    view: int | None = None
    """Which of `context.views` is this body's; the stack sets it."""

    def look(self) -> Hashable:
        """Bodies that look alike share the view that one of them prepares; None prepares none."""
        return None

    def prepare(self, context: Context, cell: Cell | None, T: int) -> View | None:
        """What all bodies of this look need for the next T tokens; called once, before the first layer."""
        return None

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell | None:
        """What this body remembers between calls, for `batch` rows of up to `room` tokens."""
        return None

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        raise AssertionError(f"{type(self).__name__} does not say what it computes")


class WholeBody(Body):
    """A body that sees all tokens at once, whatever the mask: it stands where the mask hides nothing to come."""

    spec: Mixer

    def new_cell(self, batch: int, room: int, given: Mapping[str, Tensor]) -> Cell | None:
        raise self.misplaced()

    def misplaced(self) -> QkvError:
        name = type(self.spec).__name__
        return QkvError(f"{name} sees tokens to come, of which a decoder and its cache know none: use the mask Full()")

    def forward(self, x: Tensor, context: Context, cell: Cell | None = None) -> Tensor:
        if context.mask.incremental:
            raise self.misplaced()
        return self.mix(x, context)

    def mix(self, x: Tensor, context: Context) -> Tensor:
        """B T C → B T C."""
        raise AssertionError(f"{type(self).__name__} does not say what it computes")
