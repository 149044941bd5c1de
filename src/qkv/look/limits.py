"""What this machine can do at best: how fast it reads memory and multiplies matrices, measured through torch."""

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """Measured with so many threads."""

    threads: int
    bandwidth: float
    """Bytes read a second."""
    products: dict[str, float]
    """Operations a second in a product of two matrices, 2 for each multiply-add, by the type of the numbers."""

    def product(self, kind: str) -> float:
        """The limit for a type; where torch shows none, that of fp32, which packed weights may pass."""
        return self.products.get(kind, self.products["fp32"])

    def __str__(self) -> str:
        products = ", ".join(f"{rate / 1e9:,.0f} {kind}" for kind, rate in self.products.items())
        return f"reads {self.bandwidth / 1e9:.1f} GB/s, multiplies {products} Gop/s"


def measure_limits(threads: int | None = None, *, size: int = 1 << 26, side: int = 2048) -> Limits:
    """Sums of `size` floats, and products of matrices of up to side × side; the best of a few, in about a second."""
    with threading(threads) as count, torch.inference_mode():
        x = torch.ones(size)
        bandwidth = 4 * size / best(x.sum)
        del x
        products = {name: multiplying(kind, side) for name, kind in KINDS.items()}
    return Limits(count, bandwidth, sound(products))


KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def sound(products: Mapping[str, float | None]) -> dict[str, float]:
    """Without the types that torch cannot multiply, or has no instructions for, so that fp32 is faster: no limit."""
    least = products["fp32"] or 0.0
    return {name: rate for name, rate in products.items() if rate is not None and rate >= least}


def multiplying(kind: torch.dtype, most: int) -> float | None:
    """Operations a second, with matrices as large as need be to keep the machine busy; None where torch cannot."""
    side, rate = min(256, most), 0.0
    while True:
        x, w = (torch.ones(side, side).to(kind) for _ in range(2))
        product = product_of(x, w)
        try:
            seconds = best(product)
        except RuntimeError:
            return None
        rate = max(rate, 2 * side**3 / seconds)
        if seconds > 0.02 or 2 * side > most:
            return rate
        side *= 2


def product_of(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    if x.dtype == torch.int8:
        return lambda: torch._int_mm(x, w.T)  # torch's only product of int8 into int32
    return lambda: torch.nn.functional.linear(x, w)


def best(call: Callable[[], object], times: int = 5) -> float:
    """The fewest seconds of a few calls."""
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


@contextmanager
def threading(threads: int | None) -> Iterator[int]:
    """Torch with so many threads for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def machine() -> str:
    """The processor's name, and how many of its cores this process may use."""
    table = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", table.read_text()) if table.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor() or 'unknown processor'}, {cores} cores"


def free_memory() -> int | None:
    """Bytes that a program could take now; None where the system does not say."""
    table = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s*(\d+) kB", table.read_text()) if table.exists() else None
    return 1024 * int(found[1]) if found else None


def peak_memory() -> int | None:
    """The most bytes that this process has had in memory; None where the system does not say."""
    table = Path("/proc/self/status")
    if table.exists():  # getrusage counts what the process had before it became this program
        found = re.search(r"VmHWM:\s*(\d+) kB", table.read_text())
        return 1024 * int(found[1]) if found else None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else 1024 * peak
