"""Compiling: other processors' instructions, several processes at a time, and what can go wrong."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qkv.errors import QkvError
from qkv.native import build
from qkv.native.library import lanes, library
from tests.native.sample import sample

OTHERS = ["x86-64", "haswell"] if platform.machine() in ("x86_64", "AMD64") else []
"""The portable build, and that for AVX2."""


def test_every_build_computes_the_same_and_many_may_build_at_a_time(tmp_path: Path) -> None:
    runs = {}
    for n, march in enumerate([*OTHERS, *OTHERS[:1]] or ["", ""]):  # one of them twice, at the same time
        environment = {**os.environ, "QKV_CACHE": str(tmp_path), **({"QKV_MARCH": march} if march else {})}
        command = [sys.executable, "-m", "tests.native.sample", str(tmp_path / f"{n}.npz")]
        runs[n] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    expected = sample()
    for n, process in runs.items():
        said = process.communicate()[1]
        assert process.returncode == 0 and said.startswith("compiling qkv's kernels for this processor, once"), said
        found = np.load(tmp_path / f"{n}.npz")
        for name, one in expected.items():
            if name.startswith(("product", "rows")):  # not a bit depends on how they are added up
                assert np.array_equal(found[name], one), name
            else:
                error = np.abs(found[name] - one).max() / np.abs(one).max()
                assert error <= (1e-5 if name.startswith("floats") else 2e-3), (name, error)
    kept = [path.suffix for path in (tmp_path / "native").iterdir()]
    assert kept == [".so"] * max(1, len(OTHERS))  # and nothing half-made


# --- with a compiler of our own ---


def compiler(folder: Path, does: str) -> Path:
    """A compiler that does this, and counts how often it compiles."""
    made = folder / "cc"
    asked = 'case "$*" in *--version) exit; esac'
    made.write_text(f"#!/bin/sh\n{asked}\necho x >> {folder}/calls\nfor out; do :; done\n{does}\n")
    made.chmod(0o755)
    return made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QKV_MARCH", raising=False)
    return tmp_path / "cache"


def built() -> Path:
    return build.built.__wrapped__()


def test_it_compiles_once_for_each_processor_and_source(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'echo "$@" > "$out"')))
    first = built()
    assert built() == first and (tmp_path / "calls").read_text() == "x\n" and "library.cpp -o" in first.read_text()
    assert capsys.readouterr().err.count("compiling") == 1
    monkeypatch.setenv("QKV_MARCH", "armv9-a")
    second = built()
    assert second != first and "-march=armv9-a" in second.read_text()
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "library.cpp").write_text("int qkv;")
    monkeypatch.setattr(build, "SOURCES", sources)
    third = built()
    monkeypatch.setattr(build, "processor", lambda: "another")
    assert len({first, second, third, built()}) == 4 == len(list((cache / "native").iterdir()))


@pytest.fixture
def fresh(cache: Path) -> Iterator[None]:
    """As in a process that has not yet looked for its kernels."""
    build.built.cache_clear()
    yield
    build.built.cache_clear()


def test_a_damaged_library_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    sound = build.built()
    request.getfixturevalue("fresh")
    monkeypatch.setenv("CXX", str(compiler(tmp_path, f'cp "{sound}" "$out"')))
    build.built().write_bytes(b"")
    assert library.__wrapped__().qkv_lanes() == lanes()
    assert (tmp_path / "calls").read_text() == "x\nx\n"


def test_what_cannot_be_loaded_is_said(tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'echo > "$out"')))
    with pytest.raises(QkvError, match="the kernels cannot be loaded"):
        library.__wrapped__()


def test_without_a_compiler_a_sentence_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(
        QkvError, match=r"^there is no C\+\+ compiler \(/nonexistent/c\+\+\): install g\+\+ or clang, or"
    ):
        built()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(
        QkvError, match=r"^there is no C\+\+ compiler \(c\+\+\): install g\+\+ or clang, or name one in"
    ):
        built()
    assert not cache.exists()


def test_a_compiler_may_be_a_command_with_arguments(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiler(tmp_path, 'echo "$@" > "$out"')
    wrapper = tmp_path / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{wrapper} {made} -pipe")
    assert built().read_text().startswith("-pipe -std=")
    (tmp_path / "a b").mkdir()
    monkeypatch.setenv("CXX", str(made.rename(tmp_path / "a b" / "cc")))
    assert built().read_text().startswith("-std=")
    monkeypatch.setenv("CXX", "g++ '-pipe")
    with pytest.raises(
        QkvError, match=r"""^CXX is "g\+\+ '-pipe", which is no command \(No closing quotation\): name a"""
    ):
        built()


@pytest.mark.parametrize(("does", "says"), [
    ("echo 'In x.h:\nx.h:3:1: error: no such\n  3 | F\nx.h:4:1: error: more' >&2; exit 1", "x.h:3:1: error: no such"),
    ("echo 'cc: out of\n\nmemory' >&2; echo half > $out; exit 4", "cc: out of memory"),
    ("kill -9 $$", "it ended with status -9"),
])  # fmt: skip
def test_a_compiler_that_fails_gives_a_sentence(
    does: str, says: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, does)))
    for _ in range(2):  # a failure is not remembered
        with pytest.raises(QkvError) as caught:
            built()
        assert str(caught.value) == f"{tmp_path / 'cc'} cannot compile qkv's kernels: {says}"
    assert not list((cache / "native").iterdir())


def test_a_cache_that_cannot_be_written_to_is_named(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'echo > "$out"')))
    cache.write_text("a file")
    with pytest.raises(QkvError, match=f"{cache / 'native'} cannot be written to .*: set QKV_CACHE to another folder"):
        built()
