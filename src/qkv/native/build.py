"""Compiling the kernels, once for each processor and compiler, into the user's cache."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

from qkv.checkpoints.pull import cache_folder
from qkv.checkpoints.whole import sync
from qkv.errors import QkvError

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-w")
"""No flag that changes what arithmetic means: equal sums must come out equal however the work is cut."""


@cache
def built() -> Path:
    """The compiled library; QkvError where there is no compiler, or it fails."""
    compiler = find_compiler()
    command = [*compiler, *FLAGS, *tuning()]
    target = cache_folder() / "native" / f"{fingerprint(compiler, command)}.so"
    if target.exists():
        return target
    print("compiling qkv's kernels for this processor, once (10 to 30 s) …", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            compile_to(made, compiler, command)
            sync(made)
            os.replace(made, target)
    except OSError as fault:
        raise QkvError(
            f"{target.parent} cannot be written to ({fault.strerror}): set QKV_CACHE to another folder"
        ) from None
    return target


def compile_to(made: Path, compiler: list[str], command: list[str]) -> None:
    done = subprocess.run([*command, str(SOURCES / "library.cpp"), "-o", str(made)], capture_output=True, text=True)
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), "").strip()
        said = said or " ".join(done.stderr.split())[-200:] or f"it ended with status {done.returncode}"
        raise QkvError(f"{shlex.join(compiler)} cannot compile qkv's kernels: {said}")


def rebuilt() -> Path:
    """The library compiled anew, where what stands there cannot be loaded."""
    with suppress(OSError):
        built().unlink()
    built.cache_clear()
    return built()


def find_compiler() -> list[str]:
    """The compiler and its first arguments: CXX may be `ccache g++`, or a path with spaces in it."""
    asked = os.environ.get("CXX", "").strip()
    try:
        words = [asked] if shutil.which(asked) else shlex.split(asked)
    except ValueError as fault:
        raise QkvError(f"CXX is {asked!r}, which is no command ({fault}): name a compiler in it, such as g++") from None
    for name, *arguments in [words] if words else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(name):
            return [found, *arguments]
    raise QkvError(f"there is no C++ compiler ({asked or 'c++'}): install g++ or clang, or name one in CXX")


def tuning() -> list[str]:
    """The flag that lets a compiler use all that this processor has; tests set QKV_MARCH to try another."""
    asked = os.environ.get("QKV_MARCH")
    if asked:
        return [f"-march={asked}"]
    return ["-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]


def fingerprint(compiler: list[str], command: list[str]) -> str:
    """Names what a compiled library depends on: the sources, the command, the compiler and the processor."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    parts = [*command, version, processor(), *(path.read_text() for path in sorted(SOURCES.iterdir()))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def processor() -> str:
    """What this processor can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    said = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(said)])
