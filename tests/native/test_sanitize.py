"""The kernels under the sanitizers: no byte out of bounds, nothing undefined, no race of two threads."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qkv.native.build import SOURCES, find_compiler, tuning

DRIVER = Path(__file__).with_name("sanitize.cpp")
KINDS = {
    "addresses and undefined behaviour": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
FLAGS = ["-std=c++20", "-O1", "-g1", "-w", "-ffp-contract=off", "-pthread", f"-I{SOURCES}"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """All of them being compiled, side by side."""
    compiler, folder = find_compiler(), tmp_path_factory.mktemp("sanitize")
    made = {}
    for n, (kind, flags) in enumerate(KINDS.items()):
        command = [*compiler, *FLAGS, *tuning(), *flags, str(DRIVER), "-o", str(folder / str(n))]
        made[kind] = subprocess.Popen(command, stderr=subprocess.PIPE, text=True), folder / str(n)
    yield made
    for process, _ in made.values():
        process.kill()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found(kind: str, compiled: dict[str, tuple[subprocess.Popen[str], Path]]) -> None:
    process, program = compiled[kind]
    said = process.communicate()[1]
    assert process.returncode == 0, said
    environment = {name: value for name, value in os.environ.items() if not name.endswith("SAN_OPTIONS")}
    done = subprocess.run([program], capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stdout + done.stderr[-4000:]
