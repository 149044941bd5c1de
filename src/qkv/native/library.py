"""The compiled kernels, and the records that they take, as ctypes sees them (`kernels/program.h`)."""

import ctypes as ct
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum, IntFlag
from functools import cache
from typing import Any, ClassVar, TypeAlias
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.native.build import built, rebuilt
from qkv.ops.sample.scores import MAX, SUM

Numbers: TypeAlias = np.ndarray[Any, Any]


class Kind(IntEnum):
    EMBED, NORM, LINEAR, KEYS, ATTEND, ROUTE, ADD, CONVOLVE, SCAN, RECALL, FEATURE, DECAY, MIX = range(13)


class NormKind(IntEnum):
    NONE, RMS, LAYER, TANH, AFFINE = range(5)


class RuleKind(IntEnum):
    STEP, SUM, MEAN, DELTA, EXPONENTIAL, BONUS = range(6)


class FeatureKind(IntEnum):
    POINTWISE, POSITIVE, SOFTMAX, UNIT = range(4)


ACTS = ("identity", "relu", "gelu", "gelu-tanh", "silu", "tanh", "sigmoid", "softplus", "softcap")


class Store(IntFlag):
    """How a weight is kept: 4 bits, or with BITS8 8; or FLOAT, or BFLOAT."""

    BITS8, HALVES, MINIMA, FLOAT = 1, 2, 4, 8
    BFLOAT = 9

    @property
    def dense(self) -> bool:
        return self >= Store.FLOAT


PAGE, BLOCK = 64, 32
INPUT, OUTPUT = 0, 1
FAR = 2**31 - 1
"""A query that sees as far as there is anything."""

POINTERS = (
    *("weight", "bias", "norm_weight", "norm_bias", "cos", "sin", "position", "segment", "distance"),
    *("decay", "skip"),
    *("query_weight", "query_bias", "key_weight", "key_bias"),
)


class Op(ct.Structure):
    _fields_ = (
        [(name, ct.c_int32) for name in ("kind", "in", "out", "residual", "in_at", "out_at", "inputs", "outputs")]
        + [(name, ct.c_int32) for name in ("store", "norm", "act", "gated", "heads", "groups", "head_width", "turned")]
        + [(name, ct.c_int32) for name in ("behind", "ahead", "experts", "choices", "routes", "weighted", "normalise")]
        + [(name, ct.c_int32) for name in ("taps", "states", "steps", "keys", "gate", "gate_at")]
        + [(name, ct.c_int32) for name in ("memory", "table_rows", "rule", "feature", "shares", "writes")]
        + [(name, ct.c_float) for name in ("eps", "key_eps", "scale", "softcap", "most", "least")]
        + [("keys_at", ct.c_int64), ("values_at", ct.c_int64), ("state_at", ct.c_int64)]
        + [(name, ct.c_void_p) for name in POINTERS]
    )  # fmt: skip


class Cache(ct.Structure):
    arrays: Any = None

    _fields_ = (
        ("address", ct.c_void_p),
        ("table", ct.c_void_p),
        ("stride", ct.c_int32),
        ("lengths", ct.c_void_p),
    )


class Call(ct.Structure):
    _fields_ = (
        ("rows", ct.c_int32),
        ("tokens", ct.c_void_p),
        ("positions", ct.c_void_p),
        ("slots", ct.c_void_p),
        ("segments", ct.c_void_p),
        ("memory_of", ct.c_void_p),
        ("input", ct.c_void_p),
        ("output", ct.c_void_p),
        ("states", ct.c_void_p),
        ("text", Cache),
        ("memory", Cache),
    )


@cache
def library() -> ct.CDLL:
    """The kernels, compiled if they are not yet; QkvError where they cannot be."""
    try:
        lib = ct.CDLL(str(built()))
    except OSError:  # cut off by a full disk, say
        try:
            lib = ct.CDLL(str(rebuilt()))
        except OSError as fault:
            raise QkvError(f"the kernels cannot be loaded ({fault}): set QKV_CACHE to another folder") from None
    lib.qkv_engine.argtypes, lib.qkv_engine.restype = [ct.c_int], ct.c_void_p
    lib.qkv_engine_free.argtypes, lib.qkv_engine_free.restype = [ct.c_void_p], None
    lib.qkv_program.argtypes = [ct.c_void_p, ct.c_int, ct.c_void_p, ct.c_int, ct.c_int]
    lib.qkv_program.restype = ct.c_void_p
    lib.qkv_program_free.argtypes, lib.qkv_program_free.restype = [ct.c_void_p], None
    lib.qkv_run.argtypes, lib.qkv_run.restype = [ct.c_void_p, ct.c_void_p, ct.POINTER(Call)], ct.c_int
    lib.qkv_maxima.argtypes = [ct.c_void_p, ct.c_void_p, *[ct.c_int64] * 3, ct.c_void_p]
    lib.qkv_sums.argtypes = [ct.c_void_p, ct.c_void_p, *[ct.c_int64] * 3, ct.c_void_p, ct.c_float, ct.c_void_p]
    lib.qkv_largest.argtypes = [*[ct.c_void_p] * 2, *[ct.c_int64] * 3, ct.c_void_p, ct.c_int, *[ct.c_void_p] * 2]
    lib.qkv_maxima.restype = lib.qkv_sums.restype = lib.qkv_largest.restype = None
    lib.qkv_copy.argtypes, lib.qkv_copy.restype = [*[ct.c_void_p] * 4, *[ct.c_int64] * 3], None
    lib.qkv_lanes.argtypes, lib.qkv_lanes.restype = [], ct.c_int
    lib.qkv_tile_bytes.argtypes, lib.qkv_tile_bytes.restype = [ct.c_int, ct.c_int64], ct.c_int64
    lib.qkv_store.argtypes, lib.qkv_store.restype = [ct.c_int], ct.c_int
    lib.qkv_pack.argtypes = [ct.c_int, ct.c_void_p, ct.c_int, ct.c_int, ct.c_void_p, ct.c_int64]
    lib.qkv_pack.restype = ct.c_int
    assert (lib.qkv_op_bytes(), lib.qkv_call_bytes()) == (ct.sizeof(Op), ct.sizeof(Call))
    return lib


@cache
def lanes() -> int:
    """How many numbers one of this processor's vectors holds, and so how many outputs a tile has."""
    return int(library().qkv_lanes())


class Engine:
    """Threads that run programs, one call at a time.

    While there is an engine of several threads, torch has one: what little it does beside a program would leave its
    others spinning on the cores that the program needs (on two, 108 tokens a second became 288).
    """

    alive: ClassVar[WeakSet["Engine"]] = WeakSet()
    before = 1
    """Torch's threads without an engine."""

    def __init__(self, threads: int | None = None) -> None:
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = min(threads or allowed, allowed)  # more than there are cores would wait for each other
        self.handle = library().qkv_engine(self.threads)
        if not Engine.alive:
            Engine.before = torch.get_num_threads()
        Engine.alive.add(self)
        if self.threads > 1:
            torch.set_num_threads(1)

    def run(self, program: "Records", call: Call) -> None:
        if library().qkv_run(self.own(), program.handle, ct.byref(call)):
            raise MemoryError(f"there is no memory left for {call.rows} rows of a native program")

    def own(self) -> int:
        """Its address; a child process makes its own."""
        if self.handle is None:
            self.handle = library().qkv_engine(self.threads)
        return self.handle

    def copy(self, old: Numbers, new: Numbers, parts: Numbers, runs: int, run: int) -> None:
        """Pages at some addresses (uint64), each of so many runs of bytes: of each run the first parts[k] (int64)."""
        library().qkv_copy(self.own(), *(x.ctypes.data for x in (old, new, parts)), len(parts), runs, run)

    # --- the kernels that look at scores (`ops.sample`) ---

    def maxima(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(len(x), -(-x.shape[1] // MAX))
        library().qkv_maxima(self.own(), x.data_ptr(), *x.shape, MAX, out.data_ptr())
        return out

    def sums(self, x: Tensor, m: Tensor, T: float) -> Tensor:
        x, m = x.contiguous(), m.contiguous()
        out = x.new_empty(len(x), -(-x.shape[1] // SUM))
        library().qkv_sums(self.own(), x.data_ptr(), *x.shape, SUM, m.data_ptr(), T, out.data_ptr())
        return out

    def largest(self, x: Tensor, maxima: Tensor, k: int) -> tuple[Tensor, Tensor]:
        x, maxima = x.contiguous(), maxima.contiguous()
        values, places = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
        library().qkv_largest(
            self.own(), x.data_ptr(), *x.shape, MAX, maxima.data_ptr(), k, values.data_ptr(), places.data_ptr()
        )
        return values, places

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "handle") and not ending():
            library().qkv_engine_free(self.handle)
            Engine.alive.discard(self)
            if not Engine.alive:
                torch.set_num_threads(Engine.before)


def forked() -> None:
    """A child process has none of its parent's threads: each engine starts its own when it is next used."""
    for engine in Engine.alive:
        engine.handle = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forked)


class Records:
    """Records as the engine keeps them; the tensors that they point to live as long as they do."""

    def __init__(self, ops: Sequence[Mapping[str, Any]], widths: Sequence[int], wide_cache: bool) -> None:
        self.tensors = [value for op in ops for value in op.values() if isinstance(value, Tensor)]
        array = (Op * len(ops))(*(record(op) for op in ops))
        sizes = (ct.c_int32 * len(widths))(*widths)
        self.handle = library().qkv_program(array, len(ops), sizes, len(widths), wide_cache)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if hasattr(self, "handle") and not ending():
            library().qkv_program_free(self.handle)


def record(op: Mapping[str, Any]) -> Op:
    made = Op(residual=-1, gate=-1, scale=1.0)
    for name, value in op.items():
        setattr(made, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return made
