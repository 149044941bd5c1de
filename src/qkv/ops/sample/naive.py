"""The definitions; `Scores` are checked against them."""

import torch
from torch import Tensor


def argmax(x: Tensor) -> Tensor:
    """x: B V → B."""
    return x.argmax(-1)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x: B V → the values and their places, both B k."""
    values, ids = x.topk(k, -1)
    return values, ids


def log_p(x: Tensor, ids: Tensor) -> Tensor:
    """x: B V, ids: B → B."""
    return x.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def weights(x: Tensor, m: Tensor, T: float) -> Tensor:
    """x: B V, m: B 1 → B V."""
    return ((x - m) / T).exp()


def mass(w: Tensor) -> Tensor:
    """w: B V → B 1."""
    return w.cumsum(-1)[:, -1:]  # one after the other: a sum's order depends on the threads


def draw(w: Tensor, u: Tensor) -> Tensor:
    """w: B V, something above 0 in each row, u: B → B. What weighs nothing is never drawn.

    A row of what is no number gives some place.
    """
    reached = w.cumsum(-1)
    return first(reached, u[:, None] * reached[:, -1:])[:, 0]


def first(reached: Tensor, target: Tensor) -> Tensor:
    """The first place where sums that never fall (B N) are above the target (B 1), the last if none are: B 1."""
    return torch.searchsorted(reached, target, right=True).clamp(max=reached.shape[1] - 1)
