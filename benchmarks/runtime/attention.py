"""Causal attention, forward and backward: what our default path adds to the call of torch that it makes."""

import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work

TOKENS, SHORT, HEADS, WIDTH = 8192, 512, 8, 64


def works(settings: Settings) -> Iterator[Work]:
    tokens = settings.size(TOKENS, SHORT)
    forms = [Form("qkv", "qkv", attend, (True, tokens)), Form("torch SDPA", "torch", attend, (False, tokens))]
    name = f"causal attention, {HEADS} heads × {WIDTH}, {tokens} tokens, forward and backward, fp32"
    yield Work(name, forms, "within 5 % of SDPA")


def attend(threads: int, ours: bool, tokens: int) -> Ready:
    import torch

    from qkv.ops.attention import fused

    torch.set_num_threads(threads)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def inputs(tokens: int) -> list[torch.Tensor]:
        return [torch.randn(1, HEADS, tokens, WIDTH, requires_grad=True) for _ in range(3)]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upper: torch.Tensor) -> None:
        out = fused(q, k, v, causal=True) if ours else sdpa(q, k, v, is_causal=True)
        out.backward(upper)
        q.grad = k.grad = v.grad = None

    call(*inputs(64), torch.ones(1, HEADS, 64, WIDTH))  # what the libraries load once is not the form's
    made, upper = inputs(tokens), torch.ones(1, HEADS, tokens, WIDTH)
    before = megabytes("VmRSS")
    call(*made, upper)
    peak = megabytes("VmHWM") - before

    def measure() -> Measured:
        began = time.perf_counter()
        call(*made, upper)
        return {"tokens/s": tokens / (time.perf_counter() - began), "MB above the inputs": peak}

    return Ready(measure)


def megabytes(key: str) -> float:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[key].split()[0]) / 1024
