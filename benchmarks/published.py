"""Published checkpoints against the transformers package and llama.cpp: same text, same memory, how soon.

python -m benchmarks.published; fetches SmolLM2 and Gemma 3 through `qkv pull`. llama.cpp is asked where
llama-cpp-python is installed (pip builds it), and stories260K read where its file is there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from benchmarks.common import DATA, machine

import qkv
from qkv.checkpoints.pull import resolve
from qkv.decode import Greedy, stream
from qkv.use.convert import convert

SMOL, GEMMA = "smollm2-135m-instruct", "gemma3-270m"
PROMPT = "The capital of France is"

QKV = """
import sys, time
from qkv.train.run import open_task
from qkv.decode import Greedy, stream
task = open_task(sys.argv[1])
next(stream(task.model, task.encode(sys.argv[2]), Greedy(), limit=1))
print(time.time(), *[int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""
TRANSFORMERS = """
import sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, _, file = sys.argv[1].rpartition("/")
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
model.generate(**tokenizer(sys.argv[2], return_tensors="pt"), max_new_tokens=1, do_sample=False)
print(time.time(), *[int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""
LLAMA = """
import sys, time
from llama_cpp import Llama
model = Llama(sys.argv[1], verbose=False, n_ctx=512)
model(sys.argv[2], max_tokens=1, temperature=0)
print(time.time(), *[int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="how often the start of each program is timed, in turn")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}, {options.threads} threads, torch {torch.__version__}")
    with torch.inference_mode():
        same_ids()
        stories()
    if has_llama():
        agreement()
        round_trip()
    else:
        print("llama-cpp-python is not installed: `pip install llama-cpp-python`, then llama.cpp is asked too")
    starts(options.rounds)


def same_ids(tokens: int = 64) -> None:
    """Greedy ids of SmolLM2, ours against transformers' on the same dequantised weights."""
    from transformers import AutoModelForCausalLM

    path = resolve(SMOL)
    task = qkv.open(path)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None  # past the end too
    ids = task.encode(PROMPT)
    ours = list(stream(task.model, ids, Greedy(), limit=tokens))
    found = theirs.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :].tolist()
    logits = task.model(torch.tensor([ids])), theirs(torch.tensor([ids])).logits
    error = float((logits[0] - logits[1]).abs().max() / logits[1].abs().max())
    print(f"SmolLM2, {tokens} greedy tokens as transformers: {ours == found}, logits differ by {error:.1e}")


def stories() -> None:
    """stories260K's text, to be held against the published one."""
    path = DATA / "stories260K" / "stories260K.bin"
    if not path.exists():
        print(f"{path} is missing: stories260K is left out")
        return
    task = qkv.open(path)
    print("stories260K:", repr("".join(task.stream([task.source.begin], Greedy(), tokens=200))))


def agreement(tokens: int = 512) -> None:
    """Gemma 3 on the same file and text: how often the likeliest next token is the same, and the perplexities.

    llama.cpp rounds activations to 8 bits where weights are packed; so it is also asked about the same weights in F32,
    and with flash attention, which should change nothing: so far it agrees with itself.
    """
    path = resolve(GEMMA)
    task = qkv.open(path)
    ids = task.encode(" ".join(topics[name] for name in sorted(topics)))[:tokens]  # Python's own manual
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        plain = Path(folder, "f32.gguf")
        convert(path, plain, kind="F32")
        found = {
            "qkv": task.model(torch.tensor([ids]))[0].float(),
            "llama.cpp": llama_logits(path, ids),
            "llama.cpp with flash attention": llama_logits(path, ids, flash_attn=True),
            "llama.cpp in F32": llama_logits(plain, ids),
        }
    print(f"Gemma 3 270M (Q4_K_M), {len(ids)} tokens of plain English; the likeliest next token is the same:")
    for one, other in combinations(found, 2):
        same = (found[one].argmax(-1) == found[other].argmax(-1)).float().mean()
        print(f"  {one} and {other}: {100 * float(same):.1f} %")
    labels = torch.tensor(ids[1:])
    for name, z in found.items():
        print(f"  perplexity, {name}: {float(torch.nn.functional.cross_entropy(z[:-1], labels).exp()):.3f}")


def llama_logits(path: Path, ids: list[int], **settings: Any) -> torch.Tensor:
    """T V, as llama.cpp computes them."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=len(ids), n_batch=len(ids), logits_all=True, verbose=False, **settings)
    model.eval(ids)
    return torch.tensor(model.scores[: len(ids)]).float()


def round_trip(tokens: int = 32) -> None:
    """What `qkv convert` writes, continued by llama.cpp and by qkv; then llama.cpp on the same weights in F32."""
    for kind in ("F32", "F16", "Q8_0", "Q4_0", "Q4_1"):
        with tempfile.TemporaryDirectory() as folder:
            path, plain = Path(folder, "packed.gguf"), Path(folder, "f32.gguf")
            convert(resolve(SMOL), path, kind=kind)
            convert(path, plain, kind="F32")
            task = qkv.open(path)
            ids = task.encode(PROMPT)
            ours = list(stream(task.model, ids, Greedy(), limit=tokens, ends=task.target.ends))
            same = [
                next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), len(ours))
                for theirs in (llama_ids(path, ids, tokens), llama_ids(plain, ids, tokens))
            ]
            print(
                f"qkv convert to {kind}: of {len(ours)} greedy tokens llama.cpp's first {same[0]} are the same, "
                f"and {same[1]} on these weights in F32",
                flush=True,
            )


def llama_ids(path: Path, ids: list[int], tokens: int) -> list[int]:
    """The greedy continuation of llama.cpp."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=256, verbose=False)
    return [token for token, _ in zip(model.generate(ids, temp=0.0), range(tokens), strict=False)]


def starts(rounds: int) -> None:
    """From the start of a process to the first token, and its peak memory; the programs in turn."""
    path = str(resolve(SMOL))
    programs = {"qkv": QKV, "transformers": TRANSFORMERS} | ({"llama.cpp": LLAMA} if has_llama() else {})
    found: dict[str, list[Any]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            began = subprocess.run([sys.executable, "-c", "import time; print(time.time())"], capture_output=True)
            command = [sys.executable, "-c", program, path, PROMPT]
            start = json.loads(began.stdout)
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            at, memory = done.stdout.split()[-2:]
            found[name].append((float(at) - start, float(memory)))
    for name, times in found.items():
        seconds, memory = (median(column) for column in zip(*times, strict=True))
        print(f"SmolLM2, {name}: first token after {seconds:.2f} s, peak memory {memory:.0f} MB (median of {rounds})")


def has_llama() -> bool:
    """Whether llama-cpp-python is installed."""
    from importlib.util import find_spec

    return find_spec("llama_cpp") is not None


if __name__ == "__main__":
    main()
