"""SmolLM2: from the start of a process to the first token, and its peak memory until then. Linux."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec

from benchmarks.runtime import ours
from benchmarks.runtime.turns import Form, Measured, Ready, Settings, Work

PROMPT = "The capital of France is"

QKV = """
import sys, qkv
task = qkv.open(sys.argv[1], packed=True)
qkv.fast(task.model, int(sys.argv[3]))
print("".join(task.stream(task.encode(sys.argv[2]), tokens=1)), flush=True)
"""
LLAMA = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], verbose=False, n_ctx=512, n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]))
print(model(sys.argv[2], max_tokens=1, temperature=0)["choices"][0]["text"], flush=True)
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, _, file = sys.argv[1].rpartition("/")
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.{dtype})
made = model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=1, do_sample=False)
print(tokenizer.decode(made[0, -1:]), flush=True)
"""
PEAK = """
print(*[int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


def works(settings: Settings) -> Iterator[Work]:
    path = str(ours.files(settings)["Q4_1"])
    forms = [
        Form("qkv", "qkv", program, ("qkv", QKV, path)),
        Form("llama.cpp", "llama-cpp-python", program, ("llama_cpp", LLAMA, path)),
        *(
            Form(f"transformers {dtype}", "transformers", program,
                 ("transformers", TRANSFORMERS.format(dtype=dtype), path))
            for dtype in ("float32", "bfloat16")
        ),
    ]  # fmt: skip
    yield Work("SmolLM2-135M Q4_1, start of a process to the first token", forms, "2.5 s and 450 MB", same, "llama.cpp")


def same(token: str, other: str) -> str:
    return f"{token!r}" if token == other else f"{token!r}, not {other!r}"


def program(threads: int, module: str, text: str, path: str) -> Ready:
    """A Python program that prints the first token, and then how much memory it had."""
    if find_spec(module) is None:
        raise ImportError(f"there is no module {module}")

    tokens: list[str] = []

    def measure() -> Measured:
        command = [sys.executable, "-c", text + PEAK, path, PROMPT, str(threads)]
        began = time.perf_counter()
        with (
            tempfile.TemporaryFile("w+") as told,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True) as made,
        ):
            assert made.stdout is not None
            tokens[:] = [made.stdout.readline().removesuffix("\n")]
            seconds = time.perf_counter() - began
            memory = made.stdout.read()
            if made.wait():
                told.seek(0)
                raise RuntimeError(told.read().strip().rpartition("\n")[2])
        return {"s": seconds, "MB": float(memory)}

    return Ready(measure, lambda: tokens[0])
