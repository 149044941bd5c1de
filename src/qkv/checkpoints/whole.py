"""Files and folders that appear whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qkv.errors import QkvError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends without an error, and is gone otherwise."""
    path = path.absolute()
    part = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        part.replace(path)
    except OSError as fault:
        raise unwritten(path, fault) from fault
    finally:
        with suppress(NotADirectoryError):
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `path`, which must be new or is replaced, when the block ends without an error."""
    path = path.absolute()
    part, old = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("part", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                sync(file)
        if path.exists():
            path.replace(old)
        part.replace(path)
    except OSError as fault:
        raise unwritten(path, fault) from fault
    finally:
        if old.exists() and not path.exists():  # whatever came between the two, Ctrl-C too
            old.replace(path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def make_folder(path: Path) -> Path:
    """The folder, which may be there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise QkvError(f"the folder {path} cannot be made ({fault.strerror}); name another") from None
    return path


def refuse_filled(folder: Path) -> None:
    """Refuse a path that holds something: it is left alone."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise QkvError(f"{folder} exists and is not an empty folder; name a new one")


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Whether no other process holds the folder, which is held until the block ends; where locks are unknown, yes."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield True
        return
    handle, free = os.open(folder, os.O_RDONLY), True
    try:
        with suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        yield free
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file whole or not at all."""
    with whole_file(path) as part:
        part.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write a text file, in UTF-8, whole or not at all."""
    return write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Wait until the file is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def unwritten(path: Path, fault: OSError) -> QkvError:
    reason = fault.strerror or str(fault)
    return QkvError(f"{path} could not be written ({reason}); what was there before is untouched")
