"""SmolLM2, one text: a token at a time."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from benchmarks.runtime import ours
from benchmarks.runtime.batch import llama, transformers
from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work

PROMPT, TOKENS, SHORT = 32, 128, 8


def works(settings: Settings) -> Iterator[Work]:
    ids, tokens = ours.prompt(PROMPT), settings.size(TOKENS, SHORT)
    marks = {"Q4_1": "2 × llama.cpp", "Q8_0": "1.3 × llama.cpp", "Q4_0": "1.3 × llama.cpp"}
    for kind, path in ours.files(settings).items():
        forms = [
            Form("qkv", "qkv", qkv, (path, ids, tokens)),
            Form("llama.cpp", "llama-cpp-python", llama, (path, ids, tokens, 1)),
        ]
        if kind == "Q4_1":
            forms += [
                Form(f"transformers {dtype}", "transformers", transformers, (path, dtype, ids, tokens, 1))
                for dtype in ("fp32", "bf16")
            ]
        yield Work(f"SmolLM2-135M {kind}, decode, {tokens} tokens after {PROMPT}", forms, marks[kind])


def qkv(threads: int, path: Path, ids: Sequence[int], tokens: int) -> Ready:
    """As a text is streamed to its reader."""
    from qkv.decode import Greedy, stream

    model = ours.decoder(path, threads)

    def measure() -> Measured:
        made = stream(model, ids, Greedy(), limit=tokens + 1)
        next(made)
        began = time.perf_counter()
        count = len(list(islice(made, tokens)))
        return {"tokens/s": count / (time.perf_counter() - began)}

    return Ready(measure)
