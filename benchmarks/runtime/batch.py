"""SmolLM2, 16 texts together: a token for each at a time."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.runtime import ours
from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work

PROMPT, TOKENS, SHORT, TEXTS = 32, 64, 4, 16


def works(settings: Settings) -> Iterator[Work]:
    ids, tokens = ours.prompt(PROMPT), settings.size(TOKENS, SHORT)
    path = ours.files(settings)["Q4_1"]
    forms = [
        Form("qkv", "qkv", qkv, (path, ids, tokens, TEXTS)),
        Form("llama.cpp", "llama-cpp-python", llama, (path, ids, tokens, TEXTS)),
        Form("transformers fp32", "transformers", transformers, (path, "fp32", ids, tokens, TEXTS)),
        Form("transformers bf16", "transformers", transformers, (path, "bf16", ids, tokens, TEXTS)),
    ]
    yield Work(
        f"SmolLM2-135M Q4_1, decode, {TEXTS} texts together, {tokens} tokens after {PROMPT}", forms, "4.5 × llama.cpp"
    )


def qkv(threads: int, path: Path, ids: Sequence[int], tokens: int, texts: int) -> Ready:
    import torch

    from qkv.decode.search import Rows

    model = ours.decoder(path, threads)

    @torch.inference_mode()
    def measure() -> Measured:
        rows = Rows(model, [ids] * texts, None, [tokens + 1] * texts, (), ())
        began = time.perf_counter()
        for _ in range(tokens):
            rows.feed(rows.scores.argmax())
        return {"tokens/s": texts * tokens / (time.perf_counter() - began)}

    return Ready(measure)


def llama(threads: int, path: Path, ids: Sequence[int], tokens: int, texts: int) -> Ready:
    from benchmarks.runtime.llama import Llama

    model = Llama(path, threads, texts, room=256)

    def measure() -> Measured:
        model.clear()
        model.fill([ids] * texts, 0)
        last = model.run()
        began = time.perf_counter()
        for n in range(tokens):
            model.fill([[token] for token in last.tolist()], len(ids) + n)
            last = model.run()
        return {"tokens/s": texts * tokens / (time.perf_counter() - began)}

    return Ready(measure)


def transformers(threads: int, path: Path, dtype: str, ids: Sequence[int], tokens: int, texts: int) -> Ready:
    """Its model, stepped without what `generate` does around it."""
    import torch

    model = transformers_model(threads, path, dtype)

    @torch.inference_mode()
    def measure() -> Measured:
        made = model(torch.tensor([list(ids)] * texts), use_cache=True, logits_to_keep=1)
        began = time.perf_counter()
        for _ in range(tokens):
            token = made.logits[:, -1:].argmax(-1)
            made = model(token, past_key_values=made.past_key_values, use_cache=True)
        made.logits.argmax(-1)
        return {"tokens/s": texts * tokens / (time.perf_counter() - began)}

    return Ready(measure)


def transformers_model(threads: int, path: Path, dtype: str) -> Any:
    """The weights of a .gguf file, dequantised."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()  # it says that packed weights prefer fp32, and then unpacks them
    torch.set_num_threads(threads)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=kind).eval()
