"""Files and folders that appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from qkv.checkpoints import whole
from qkv.errors import QkvError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_appear(tmp_path):
    whole.write_text(tmp_path / "new" / "a.txt", "字\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "字\n".encode()
    for text in ("first", "second"):
        with whole.whole_folder(tmp_path / "b") as part:
            (part / text).write_text(text)
    assert names(tmp_path / "b") == ["second"] and names(tmp_path) == ["b", "new"]


@pytest.mark.parametrize("at", ["write", "fsync"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, at):
    whole.write_text(tmp_path / "a.txt", "before")
    with whole.whole_folder(tmp_path / "b") as part:
        (part / "c").write_text("before")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if at == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "write_bytes", full)
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(QkvError, match=r"a.txt could not be written \(No space left on device\)"):
        whole.write_text(tmp_path / "a.txt", "after")
    with pytest.raises(QkvError, match="untouched"), whole.whole_folder(tmp_path / "b") as part:
        (part / "c").write_text("after")
    assert names(tmp_path) == ["a.txt", "b"]
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b" / "c").read_text() == "before"


def test_an_interruption_between_two_renames_leaves_what_was_there(tmp_path, monkeypatch):
    with whole.whole_folder(tmp_path / "b") as part:
        (part / "c").write_text("before")
    replace = Path.replace

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".part"):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt), whole.whole_folder(tmp_path / "b") as part:
        (part / "c").write_text("after")
    assert names(tmp_path) == ["b"] and (tmp_path / "b" / "c").read_text() == "before"


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), whole.whole_folder(tmp_path / "b") as part:
        (part / "c").write_text("half")
        raise KeyError
    with pytest.raises(QkvError), whole.whole_file(tmp_path / "taken") as file:
        (tmp_path / "taken").mkdir()
        file.write_text("half")
    assert names(tmp_path) == ["taken"]
