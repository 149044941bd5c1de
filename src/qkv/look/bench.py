"""How fast a model runs here, by its native program and by torch, and how near that is to what the machine can do.

Two bounds hold for any program: a call cannot end before the weights it needs are read from memory once, nor before
they are multiplied with every token. Each speed stands beside the nearer of the two, as a share of it. What attention
does beside the weights is not counted, so that long texts seem further from their bound than they are.
"""

import dataclasses as dc
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qkv.checkpoints.gguf_model import load_gguf
from qkv.checkpoints.pull import resolve
from qkv.decode import Beam, decode
from qkv.decode.search import Rows
from qkv.errors import QkvError
from qkv.look.limits import Limits, free_memory, machine, measure_limits, peak_memory, threading
from qkv.models import EncoderDecoderModel, Module
from qkv.native import fast
from qkv.ops.blocks.packed import Packed
from qkv.parts import Sparse
from qkv.parts.head import VocabularyHead
from qkv.train.run import dtype_of, load

FORMS = ("native", "torch")
PROMPT, TOKENS, TOGETHER, LONG = 32, 64, 16, 512
TEXTS, SHORTEST, LONGEST = 64, 8, 128
SOURCE, OUT, PATHS = 20, 30, 4
ROUNDS = 3

Texts: TypeAlias = list[list[int]]


@dc.dataclass(frozen=True)
class Speed:
    """Units a second, and which share of the time reading the weights, or multiplying with them, must take."""

    rate: float
    reading: float
    multiplying: float


@dc.dataclass(frozen=True)
class Figure:
    """How fast one kind of work is done, by form: `native`, `torch`."""

    work: str
    unit: str
    speeds: dict[str, Speed]


@dc.dataclass(frozen=True)
class Start:
    """From the start of a process to its first result, and the most memory that it had until then."""

    seconds: float
    bytes: int | None


@dc.dataclass(frozen=True)
class Bench:
    """What `bench` found."""

    model: str
    machine: str
    limits: Limits
    parameters: int
    bytes: dict[str, int]
    """Of the weights, by form."""
    starts: dict[str, Start]
    figures: list[Figure]
    notes: list[str]
    """What was left out, and why."""

    def __str__(self) -> str:
        return "\n".join(lines(self))


def bench(name: str | Path, *, dtype: str | None = None, threads: int | None = None, seconds: float = 1.0) -> Bench:
    """Measure a model that `load` takes; each measurement takes about so many `seconds`, the whole some ten times that.

    The native program uses the weights of a .gguf file packed as they are; torch uses them in `dtype`, or as `load`
    gives them. Decoders continue texts, encoders read them, and an encoder-decoder answers them by a beam of 4.
    """
    if not 0 < seconds < math.inf:
        raise QkvError(f"a measurement takes a time above 0, not {seconds} s")
    if threads is not None and threads < 1:
        raise QkvError(f"a measurement takes at least 1 thread, not {threads}")
    path, kind = resolve(name), dtype_of(dtype)
    with threading(threads) as count:
        notes: list[str] = []
        limits = measure_limits(count)
        models = opened(path, kind, count, notes)
        first = next(iter(models.values()))
        works = list(works_of(first, limits, seconds))
        figures = [measured(work, models, limits, seconds) for work in works]
        size = {form: sum(held(p) for p in model.parameters()) for form, model in models.items()}
        parameters = first.count()
        del models, first
        starts = {form: start(path, form, dtype, count) for form in size}
    return Bench(str(name), machine(), limits, parameters, size, starts, figures, notes)


# --- the forms of a model ---


def opened(path: Path, dtype: torch.dtype | None, threads: int, notes: list[str]) -> dict[str, Module]:
    """The model in each form that can be had here; what cannot is noted."""
    models: dict[str, Module] = {}
    model = form_of(path, "native", dtype)
    needed = model.count() * (dtype or torch.float32).itemsize
    try:
        if fast(model, threads, say=notes.append).programs:
            models["native"] = model
    except QkvError as fault:
        notes.append(str(fault))
    free = free_memory()
    if models and path.suffix == ".gguf" and free is not None and needed > 0.9 * free:
        notes.append(f"torch needs {needed / 1e9:.1f} GB for these weights, and {free / 1e9:.1f} GB are free")
    else:
        models["torch"] = form_of(path, "torch", dtype)
    return models


def form_of(path: Path, form: str, dtype: torch.dtype | None) -> Module:
    if form == "native" and path.suffix == ".gguf":
        return load_gguf(path, dtype or torch.float32, packed=True)
    return load(path, dtype)


# --- what is measured ---


@dc.dataclass(frozen=True)
class Work:
    """Something that a model does again and again."""

    name: str
    unit: str
    begin: Callable[[Module], Callable[[], object]]
    """Makes a model ready; what it gives is called and timed."""
    units: int
    """That one call does."""
    passes: dict[str, tuple[int, int]]
    """Part of the model → how often one call reads its weights, and with how many tokens it multiplies them."""
    most: int = sys.maxsize
    """So many calls there is room for."""


def works_of(model: Module, limits: Limits, seconds: float) -> Iterator[Work]:
    """What this kind of model does."""
    if isinstance(model, EncoderDecoderModel):
        yield from (answering(model, batch) for batch in (1, TOGETHER))
    elif model.wiring.mask.incremental and isinstance(model.head, VocabularyHead):
        yield from (decoding(model, batch) for batch in (1, TOGETHER))
        yield reading(model, fitting(LONG, PROMPT, model, limits, seconds))
    else:
        yield embedding(model, fitting(TEXTS, TOGETHER, model, limits, seconds / LONGEST))


def fitting(most: int, least: int, model: Module, limits: Limits, seconds: float) -> int:
    """A size of work that should not take much longer than so many seconds, however large the model is."""
    each = 2 * sum(weight.numel() * share for some in parts(model).values() for weight, share in some)
    while most > least and most * each / limits.product("fp32") > 2 * seconds:
        most //= 2
    return most


def decoding(model: Module, batch: int) -> Work:
    """Greedy tokens, one after the other."""
    room = model.positions or PROMPT + TOKENS
    prompt = min(PROMPT, max(1, room // 2))
    tokens = min(TOKENS, room - prompt)
    prompts = texts(model, [prompt] * batch)

    def begin(model: Module) -> Callable[[], object]:
        rows = Rows(model, prompts, None, [tokens + 1] * batch, (), ())
        return lambda: rows.feed(rows.scores.argmax())

    name = "decode" if batch == 1 else f"decode, {batch} texts together"
    return Work(name, "tokens/s", begin, batch, {"text": (1, batch), "head": (1, batch)}, tokens)


def reading(model: Module, tokens: int) -> Work:
    """A prompt read, and the scores of what comes next."""
    tokens = min(tokens, model.positions or tokens)
    ids = torch.tensor(texts(model, [tokens]))

    def begin(model: Module) -> Callable[[], object]:
        return lambda: model.logits(model.hidden(ids, state=model.new_state(1, tokens))[:, -1])

    return Work(f"read a prompt of {tokens}", "tokens/s", begin, tokens, {"text": (1, tokens), "head": (1, 1)})


def embedding(model: Module, count: int) -> Work:
    """Texts of 8 to 128 tokens, those of like length together."""
    longest = min(LONGEST, model.positions or LONGEST)
    lengths = torch.linspace(min(SHORTEST, longest), longest, count).long().split(TOGETHER)
    ids = [torch.tensor([padded(row, int(some.max())) for row in texts(model, some.tolist())]) for some in lengths]

    def begin(model: Module) -> Callable[[], object]:
        read = model.hidden if model.head is None or isinstance(model.head, VocabularyHead) else model
        return lambda: [read(some, lengths=each) for some, each in zip(ids, lengths, strict=True)]

    name = f"read texts of {min(SHORTEST, longest)} to {longest} tokens"
    tokens = sum(int(some.sum()) for some in lengths)
    return Work(name, "texts/s", begin, count, {"text": (len(ids), tokens)})


def answering(model: EncoderDecoderModel, batch: int) -> Work:
    """Texts answered by a beam, without an end."""
    source = torch.tensor(texts(model, [min(SOURCE, model.source.room or SOURCE)] * batch))
    out = min(OUT, model.embed.room or OUT)

    def begin(model: Module) -> Callable[[], object]:
        def call() -> object:
            assert isinstance(model, EncoderDecoderModel)
            memory = model.encode(source)
            return decode(model, [[0]] * batch, Beam(PATHS), limits=[out] * batch, ends=None, memory=memory)

        return call

    passes = {"encoder": (1, source.numel()), "text": (out, out * PATHS * batch), "head": (out, out * PATHS * batch)}
    name = f"answer {'a text' if batch == 1 else f'{batch} texts together'}, beam {PATHS}"
    return Work(name, "tokens/s", begin, batch * out, passes)


def texts(model: Module, lengths: Sequence[int]) -> Texts:
    """Texts of any tokens: which they are changes no speed."""
    embed = model.source if isinstance(model, EncoderDecoderModel) else model.wiring.embed
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(len(embed.table), (length,), generator=draw).tolist() for length in lengths]


def padded(row: list[int], length: int) -> list[int]:
    return row + [0] * (length - len(row))


# --- measuring ---


def measured(work: Work, models: Mapping[str, Module], limits: Limits, seconds: float) -> Figure:
    """The forms in turn, so that a drift of the machine meets both."""
    calls: dict[str, list[float]] = {form: [] for form in models}
    for model in models.values():
        timed(work, model, 0)  # what is slow only the first time
    for _ in range(ROUNDS):
        for form, model in models.items():
            with threading(limits.threads if form == "torch" else 1):  # beside a program torch keeps to one
                calls[form].append(timed(work, model, seconds / ROUNDS))
    speeds = {}
    for form, model in models.items():
        rate, (read, multiply) = median(calls[form]), least(work, model, limits)
        speeds[form] = Speed(work.units * rate, read * rate, multiply * rate)
    return Figure(work.name, work.unit, speeds)


@torch.inference_mode()
def timed(work: Work, model: Module, seconds: float) -> float:
    """Calls a second: one at least."""
    call = work.begin(model)
    count, began = 0, time.perf_counter()
    while not count or (count < work.most and time.perf_counter() - began < seconds):
        call()
        count += 1
    return count / (time.perf_counter() - began)


def least(work: Work, model: Module, limits: Limits) -> tuple[float, float]:
    """The seconds that one call needs at least, to read the weights and to multiply with them."""
    matrices, read, multiply = parts(model), 0.0, 0.0
    for part, (passes, tokens) in work.passes.items():
        for weight, share in matrices[part]:
            read += passes * held(weight) * min(1.0, share * tokens / passes) / limits.bandwidth
            multiply += 2 * weight.numel() * share * tokens / limits.product(kind_of(weight))
    return read, multiply


Matrices: TypeAlias = list[tuple[Tensor, float]]
"""Weights, and the share of each that one token multiplies with."""


def parts(model: Module) -> dict[str, Matrices]:
    """The matrices of the text's stack, of the head over a vocabulary, and of an encoder; in the order of use."""

    def stack(module: nn.Module) -> Matrices:
        return [
            (weight, chosen(inner)) for inner in module.modules() for weight in own(inner) if weight.dim() > 1
        ]  # fmt: skip

    wirings = {"text": model.wiring}
    if isinstance(model, EncoderDecoderModel):
        wirings["encoder"] = model.reading
    found: dict[str, Matrices] = {
        part: [one for n in range(len(wiring.stack.use)) for one in stack(wiring.stack.layer(n))]
        for part, wiring in wirings.items()
    }
    head = model.head
    if isinstance(head, VocabularyHead):
        found["head"] = stack(head) if head.weight is not None else [*stack(head), (model.wiring.embed.table, 1.0)]
    return found


def own(module: nn.Module) -> Iterator[Tensor]:
    return module.parameters(recurse=False)


def chosen(module: nn.Module) -> float:
    """The share of a module's weights that one token multiplies with: of experts only those that it is sent to."""
    spec = getattr(module, "spec", None)
    return spec.router.k / spec.count if isinstance(spec, Sparse) else 1.0


def held(weight: Tensor) -> int:
    """Bytes in memory."""
    return weight.blocks.numel() if isinstance(weight, Packed) else weight.numel() * weight.element_size()


def kind_of(weight: Tensor) -> str:
    """The numbers that a weight is multiplied as, at best."""
    if isinstance(weight, Packed):
        return "int8"
    return "bf16" if weight.dtype == torch.bfloat16 else "fp32"


# --- the start of a process ---


def start(path: Path, form: str, dtype: str | None, threads: int) -> Start:
    """Start a process that opens the model and does the least with it."""
    command = [sys.executable, "-c", "from qkv.look.bench import begin; begin()", str(path), form, dtype or ""]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        line = program.stdout.readline()
        seconds = time.perf_counter() - began
    if program.returncode:
        raise QkvError(f"{path} could not be opened in a process of its own: it ended with {program.returncode}")
    return Start(seconds, json.loads(line))


def begin() -> None:
    """What that process does: the first token, or the first text read."""
    path, form, dtype = sys.argv[1:]
    model = form_of(Path(path), form, dtype_of(dtype or None))
    if form == "native":
        fast(model, torch.get_num_threads())
    ids = torch.tensor(texts(model, [SHORTEST]))
    with torch.inference_mode():
        if isinstance(model, EncoderDecoderModel):
            decode(model, [[0]], Beam(PATHS), limits=[1], ends=None, memory=model.encode(ids))
        else:
            x = model.hidden(ids)
            if isinstance(model.head, VocabularyHead):
                model.logits(x[:, -1]).argmax()
    print(json.dumps(peak_memory()), flush=True)


# --- the table ---


def lines(bench: Bench) -> Iterator[str]:
    forms = [form for form in FORMS if form in bench.bytes]
    weights = ", ".join(f"{bench.bytes[form] / 1e6:,.1f} MB {form}" for form in forms)
    threads = f"{bench.limits.threads} thread{'s' * (bench.limits.threads > 1)}"
    yield f"{bench.model}: {bench.parameters:,} parameters; weights {weights}"
    yield f"{bench.machine}, {threads}, torch {torch.__version__}: {bench.limits}"
    yield from bench.notes
    yield ""
    both = len(forms) == len(FORMS)
    works = [f"{figure.work}, {figure.unit}" for figure in bench.figures]
    wide = max(map(len, works), default=0)
    yield " " * wide + "".join(f"{form:>14}{'of its bound':>21}" for form in forms) + "   native ÷ torch" * both
    for work, figure in zip(works, bench.figures, strict=True):
        cells = "".join(f"{figure.speeds[form].rate:>14,.1f}{bound(figure.speeds[form]):>21}" for form in forms)
        rates = [figure.speeds[form].rate for form in forms]
        yield f"{work:{wide}}{cells}" + (f"{rates[0] / rates[1]:17.2f}" if both else "")
    for form in forms:
        one = bench.starts[form]
        memory = "" if one.bytes is None else f", {one.bytes / 1e6:,.0f} MB at most"
        yield f"start to the first result, {form}: {one.seconds:.1f} s{memory}"


def bound(speed: Speed) -> str:
    """The nearer of the two bounds."""
    reading = speed.reading >= speed.multiplying
    return f"{max(speed.reading, speed.multiplying):.0%} {'reading' if reading else 'multiplying'}"
