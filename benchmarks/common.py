"""What the benchmarks share: where data lies, the machine in words, forms measured in turn."""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from qkv.look.limits import machine

__all__ = ["DATA", "in_turn", "machine", "ratio"]

K, T = TypeVar("K"), TypeVar("T")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Where data lies that is not part of the repository."""


def in_turn(forms: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """What each form gave in each round. Rounds go A B C A B C …: a machine's speed drifts, a pair's ratio hardly."""
    results: dict[K, list[T]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, measure in forms.items():
            results[name].append(measure())
    return results


def ratio(ours: list[float], theirs: list[float]) -> float:
    """The median over rounds of ours ÷ theirs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
