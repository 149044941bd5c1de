"""What a recurrence carries from token to token."""

from torch import Tensor


class Recurrent:
    """Named tensors (B …), replaced as a whole at each call and never edited, so that a mark is a few references."""

    def __init__(self, **now: Tensor) -> None:
        self.now = now

    def tensors(self) -> dict[str, Tensor]:
        return self.now

    def select(self, rows: Tensor) -> None:
        self.now = {name: value[rows] for name, value in self.now.items()}

    def mark(self) -> dict[str, Tensor]:
        return self.now

    def rewind(self, mark: dict[str, Tensor], keep: int) -> int:
        """Back to the mark itself: a recurrence cannot be run backwards, so all `keep` tokens are fed again."""
        self.now = mark
        return keep
