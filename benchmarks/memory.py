"""Mixers with a memory: their chunkwise forms against the recurrence, Mamba against its peers, slopes, and decoding.

    python -m benchmarks.memory [--only chunks mamba slope decode] [--rounds 5] [--threads 1]

chunks   the chunkwise form and the step-by-step recurrence in PyTorch, forward and backward, 4,096 tokens.
mamba    a Mamba block, forward and backward: qkv's, mambapy's, and the transformers package's Python path, whose
         memory is the highest above that with the model and its input made, each in a process of its own in which
         what is freed goes back to the system at once (Linux).
slope    time on tokens, on a log-log scale, forward and backward, 1,024 to 16,384 tokens; attention's beside it.
decode   a token after 128 and after 8,192 others in the model of the recipe `write`, and the bytes of its state.

Times are medians of rounds that go A B C A B C …, and ratios the medians of those within rounds.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from statistics import median

import torch
import torch.nn.functional as F
from benchmarks.common import in_turn, machine, ratio
from benchmarks.mixers import MIXERS, decoding, line
from torch import Tensor, nn

from qkv.context import Context
from qkv.look.limits import peak_memory
from qkv.ops import attention, recall
from qkv.parts import Mamba
from qkv.recipes import find
from qkv.train import load_recipe

HEADS, K, V = 4, 64, 64
WIDTH, STATE = 256, 16  # the block's inner width is 512
KINDS = ("constant", "scalar", "vector", "scalar + delta", "vector + delta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--form", choices=BLOCKS, help=argparse.SUPPRESS)  # the child's task
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.form:
        print(json.dumps(peak(options.form, options.tokens)))
        return
    print(f"{machine()}, {options.threads} threads, torch {torch.__version__}, fp32, {options.rounds} rounds")
    for name in options.only:
        print(flush=True)
        SECTIONS[name](options)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def row(name: str, found: list[float], text: str = "") -> None:
    print(f"{name:34}{1e3 * median(found):12,.1f} ms{text}", flush=True)


# --- one equation -------------------------------------------------------------------------------------------------


def inputs(kind: str, tokens: int) -> list[Tensor | None]:
    """q, k, v, g and beta of one row of HEADS heads, all but a constant g to be learned."""
    q, k, v = (torch.randn(1, HEADS, tokens, n) for n in (K, K, V))
    gates = {
        "constant": torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS)))),
        "scalar": -0.1 * torch.rand(1, HEADS, tokens),
        "vector": -0.1 * torch.rand(1, HEADS, tokens, K),
    }
    beta = torch.rand(1, HEADS, tokens) if "delta" in kind else None
    found = [q, F.normalize(k, dim=-1), v, gates[kind.split()[0]], beta]
    return [x.requires_grad_() if x is not None and x.dim() > 1 else x for x in found]


def learning(form: Callable[..., Tensor], xs: list[Tensor | None], tokens: int) -> Callable[[], float]:
    """Seconds of a pass forward and backward."""
    seed = torch.randn(1, HEADS, tokens, V)

    def run() -> None:
        for x in xs:
            if x is not None:
                x.grad = None
        form(*xs).backward(seed)

    run()
    return lambda: seconds(run)


def chunks(options: argparse.Namespace) -> None:
    tokens = 4096
    print(f"{HEADS} heads, keys {K} and values {V} wide, {tokens:,} tokens, forward and backward")
    for kind in KINDS:
        xs = inputs(kind, tokens)
        forms = {
            "step by step": learning(lambda *xs: recall.naive(*xs).out, xs, tokens),
            "chunkwise": learning(lambda *xs: recall.chunked(*xs).out, xs, tokens),
        }
        found = in_turn(forms, options.rounds)
        row(f"{kind}, step by step", found["step by step"])
        times = ratio(found["step by step"], found["chunkwise"])
        row(f"{kind}, chunkwise", found["chunkwise"], f"{times:9.1f} times as fast (at least 10)")


def slope(options: argparse.Namespace) -> None:
    lengths = [1024, 4096, 16384]
    print(f"{HEADS} heads, keys {K} and values {V} wide, forward and backward; slopes on log-log (at most 1.15)")
    print(f"{'':18}" + "".join(f"{f'{n:,} tokens':>16}" for n in lengths) + f"{'slope':>9}   of each step")
    for kind in ("attention", *KINDS):
        forms = {n: learning(*form_of(kind, n), n) for n in lengths}
        ms = [1e3 * median(times) for times in in_turn(forms, options.rounds).values()]
        points = [(math.log(n), math.log(time)) for n, time in zip(lengths, ms, strict=True)]
        steps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in [*pairwise(points), (points[0], points[-1])]]
        shown = "".join(f"{time:13,.0f} ms" for time in ms)
        print(f"{kind:18}{shown}{steps.pop():9.2f}   {' '.join(f'{step:.2f}' for step in steps)}", flush=True)


def form_of(kind: str, tokens: int) -> tuple[Callable[..., Tensor], list[Tensor | None]]:
    if kind == "attention":
        return (lambda q, k, v: attention.fused(q, k, v, causal=True)), inputs("scalar", tokens)[:3]
    return (lambda *xs: recall.chunked(*xs).out), inputs(kind, tokens)


# --- Mamba --------------------------------------------------------------------------------------------------------


def ours(tokens: int) -> Callable[[Tensor], Tensor]:
    block, context = Mamba(state=STATE).build(WIDTH), Context(torch.arange(tokens)[None])
    block.view, context.views = 0, [block.prepare(context, None, tokens)]
    return lambda x: block(x, context)


def mambapy(tokens: int) -> nn.Module:
    try:
        from mambapy.mamba import MambaBlock, MambaConfig
    except ImportError:
        sys.exit("the peer is missing: pip install mambapy, or --only the other sections")
    return MambaBlock(MambaConfig(d_model=WIDTH, n_layers=1, d_state=STATE))


def package(tokens: int) -> Callable[[Tensor], Tensor]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    return MambaMixer(MambaConfig(hidden_size=WIDTH, state_size=STATE, use_mambapy=False), layer_idx=0)._slow_forward


BLOCKS = {"qkv": ours, "mambapy": mambapy, "transformers": package}


def pass_of(form: str, tokens: int) -> Callable[[], None]:
    block, x = BLOCKS[form](tokens), torch.randn(1, tokens, WIDTH, requires_grad=True)
    seed = torch.randn(1, tokens, WIDTH)

    def run() -> None:
        x.grad = None
        block(x).backward(seed)

    return run


def mamba(options: argparse.Namespace) -> None:
    print(f"a Mamba block {WIDTH} wide inside {2 * WIDTH}, {STATE} numbers a channel, forward and backward")
    print(f"mambapy {version('mambapy')}, transformers {version('transformers')} (its Python path)")
    for peer, tokens, mark in (("mambapy", 1024, 3.5), ("mambapy", 4096, 3.5), ("transformers", 512, 20)):
        passes = {form: pass_of(form, tokens) for form in ("qkv", peer)}
        for run in passes.values():
            run()
        found = in_turn({form: (lambda run=run: seconds(run)) for form, run in passes.items()}, options.rounds)
        memory = {form: measured(form, tokens, options) for form in passes}
        for form in passes:
            row(f"{tokens:,} tokens, {form}", found[form], f"{memory[form] / 2**20:10,.0f} MiB")
        share = memory["qkv"] / memory[peer]
        times = ratio(found[peer], found["qkv"])
        print(f"{'':8}{times:.1f} times as fast (at least {mark:g}), {share:.3f} of the memory")


def measured(form: str, tokens: int, options: argparse.Namespace) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", f"--form={form}", f"--tokens={tokens}"]
    command += [f"--threads={options.threads}"]
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=at_once, text=True, check=True).stdout)


def peak(form: str, tokens: int) -> int:
    """The most bytes of one pass above what there is before it."""
    pass_of(form, 16)()  # what the libraries load once is not the form's
    run = pass_of(form, tokens)
    before = peak_memory()
    run()
    after = peak_memory()
    if before is None or after is None:
        sys.exit("this system does not say how much memory a process takes; leave out mamba")
    return after - before


# --- decoding -----------------------------------------------------------------------------------------------------


def decode(options: argparse.Namespace) -> None:
    near, far = 128, 8192
    print(f"{'a token, in torch, after':26}{f'{near:,}':>12}{f'{far:,}':>12}{'ratio':>8}{'bytes then':>13}{'and':>13}")
    for name in MIXERS:
        recipe = load_recipe(find("write"), [*line(name), "model.embed.vocab=70"])
        texts = {n: decoding(recipe, n) for n in (near, far)}
        found = in_turn({n: text.seconds for n, text in texts.items()}, options.rounds)
        ms = "".join(f"{1e3 * median(times):9.2f} ms" for times in found.values())
        kept = "".join(f"{text.bytes:13,}" for text in texts.values())
        print(f"{name:26}{ms}{ratio(found[far], found[near]):8.2f}{kept}", flush=True)


SECTIONS: dict[str, Callable[[argparse.Namespace], None]] = {
    "chunks": chunks,
    "mamba": mamba,
    "slope": slope,
    "decode": decode,
}


if __name__ == "__main__":
    main()
