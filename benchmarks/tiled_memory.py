"""Memory and time of causal attention, forward and backward, in its three forms. Linux.

    python -m benchmarks.tiled_memory [--tokens 8192 --heads 8 --width 64]

Each form runs in a process of its own: memory is the highest resident size above that with the inputs made, time is
the second of two passes. Rounds go naive, fused, tiled, naive, … and medians are printed. A form that does not fit in
nine tenths of the memory that is free when it starts is stopped and shown as out of memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import in_turn, machine

FORMS = ("naive", "fused", "tiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # the child's task
    options = parser.parse_args()
    if options.form:
        print(json.dumps(measure(options.form, options.tokens, options.heads, options.width)))
    else:
        compare(options)


def kilobytes(path: str, key: str) -> int:
    """One entry of a table that the kernel writes."""
    rows = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return int(rows[key].split()[0])


def measure(form: str, tokens: int, heads: int, width: int) -> dict[str, object]:
    """One form in this process: its peak above the inputs and the time of a pass."""
    import torch

    from qkv.ops import attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        out = getattr(attention, form)(q, k, v, causal=True)
        torch.autograd.backward(out.out if form == "naive" else out, torch.ones_like(q))

    def inputs(tokens: int) -> list[torch.Tensor]:
        return [torch.randn(1, heads, tokens, width, requires_grad=True) for _ in range(3)]

    attend(*inputs(64))  # what the libraries load once is not the form's
    q, k, v = inputs(tokens)
    room = kilobytes("/proc/self/status", "VmSize") + 0.9 * kilobytes("/proc/meminfo", "MemAvailable")
    resource.setrlimit(resource.RLIMIT_AS, (int(room) * 1024,) * 2)
    before = kilobytes("/proc/self/status", "VmRSS")
    settings = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    try:
        attend(q, k, v)
        peak = kilobytes("/proc/self/status", "VmHWM") - before
        q.grad = k.grad = v.grad = None
        start = time.perf_counter()
        attend(q, k, v)
    except (MemoryError, RuntimeError) as fault:
        if isinstance(fault, RuntimeError) and "memory" not in str(fault):
            raise
        return {"settings": settings, "peak": None}
    return {"settings": settings, "peak": peak / 1024, "seconds": time.perf_counter() - start}


def compare(options: argparse.Namespace) -> None:
    """Every form in turn, and the table."""
    sizes = [f"--{name}={getattr(options, name)}" for name in ("tokens", "heads", "width")]

    def child(form: str) -> Callable[[], dict]:
        command = [sys.executable, "-m", "benchmarks.tiled_memory", f"--form={form}", *sizes]
        return lambda: json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

    results = in_turn({form: child(form) for form in FORMS}, options.rounds)
    print(f"causal, forward and backward, fp32, 1 × {options.heads} × {options.tokens} × {options.width}")
    print(f"{machine()}; {results['tiled'][0]['settings']}; medians of {options.rounds} rounds\n")
    print(f"{'':8}{'peak MB':>10}{'seconds':>10}{'tiled ÷ this: memory':>24}{'time':>9}")
    tiled = medians(results["tiled"])
    for form in FORMS:
        found = medians(results[form])
        if found is None or tiled is None:
            print(f"{form:8}{'out of memory':>20}")
            continue
        memory, seconds = tiled[0] / found[0], tiled[1] / found[1]
        print(f"{form:8}{found[0]:10,.0f}{found[1]:10.2f}{memory:24.3f}{seconds:9.2f}")


def medians(runs: list[dict]) -> tuple[float, float] | None:
    """Peak and seconds, or None where a run did not fit."""
    if any(run["peak"] is None for run in runs):
        return None
    return statistics.median(run["peak"] for run in runs), statistics.median(run["seconds"] for run in runs)


if __name__ == "__main__":
    main()
