"""SmolLM2: a prompt of 512 tokens read, and the scores of what comes next."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.runtime import ours
from benchmarks.runtime.batch import transformers_model
from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work

TOKENS, SHORT = 512, 64


def works(settings: Settings) -> Iterator[Work]:
    ids, files = ours.prompt(settings.size(TOKENS, SHORT)), ours.files(settings)
    forms = [
        *(Form(f"qkv {kind}", "qkv", qkv, (files[kind], ids)) for kind in ("Q4_1", "Q4_0")),
        *(Form(f"llama.cpp {kind}", "llama-cpp-python", llama, (path, ids)) for kind, path in files.items()),
        *(Form(f"transformers {dtype}", "transformers", transformers, (files["Q4_1"], dtype, ids))
          for dtype in ("fp32", "bf16")),
    ]  # fmt: skip
    yield Work(f"SmolLM2-135M, a prompt of {len(ids)} tokens", forms, "2.4 × llama.cpp's best")


def timed(call: Callable[[], object], tokens: int) -> Measured:
    began = time.perf_counter()
    call()
    return {"tokens/s": tokens / (time.perf_counter() - began)}


def qkv(threads: int, path: Path, ids: Sequence[int]) -> Ready:
    from qkv.decode import Session

    model = ours.decoder(path, threads)
    return Ready(lambda: timed(lambda: Session(model).feed(ids).argmax(), len(ids)))


def llama(threads: int, path: Path, ids: Sequence[int]) -> Ready:
    from benchmarks.runtime.llama import Llama

    model = Llama(path, threads, 1, room=1024)

    def measure() -> Measured:
        model.clear()
        model.fill([ids], 0)
        return timed(model.run, len(ids))

    return Ready(measure)


def transformers(threads: int, path: Path, dtype: str, ids: Sequence[int]) -> Ready:
    import torch

    model, prompt = transformers_model(threads, path, dtype), torch.tensor([list(ids)])

    @torch.inference_mode()
    def measure() -> Measured:
        return timed(lambda: model(prompt, use_cache=True, logits_to_keep=1).logits.argmax(), len(ids))

    return Ready(measure)
