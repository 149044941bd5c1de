"""What the benchmarks share: where data lies, the machine in words, forms measured in turn."""

import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

K, T = TypeVar("K"), TypeVar("T")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Where data lies that is not part of the repository."""


def machine() -> str:
    """The processor's name and how many of its cores this process may use."""
    table = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", table.read_text()) if table.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or 'unknown processor'}, {cores} cores"


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
