"""Pickles of weights: refused unless they are asked for, and then read without running anything of theirs."""

import io
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkv.checkpoints.directory import Directory
from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.load import load_directory, load_published
from qkv.checkpoints.opening import opened
from qkv.checkpoints.pickled import Pickled, weights
from qkv.errors import QkvError
from tests.zoo.parity import SIZES, published, relative, rough, texts

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
ZIP, LEGACY = True, False
BIN = "pytorch_model.bin"


class Runs:
    """An object whose pickle calls a function when it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def saved(thing: object, form: bool = ZIP) -> bytes:
    stream = io.BytesIO()
    torch.save(thing, stream, _use_new_zipfile_serialization=form)
    return stream.getvalue()


@pytest.fixture(scope="module")
def theirs() -> Any:
    return rough(tf.BertForSequenceClassification(tf.BertConfig(**SIZES, num_labels=3)))


@pytest.fixture
def folder(theirs: Any, tmp_path: Path) -> Path:
    """A directory as it was before safetensors."""
    theirs.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "old" / BIN)
    return tmp_path / "old"


def refused(folder: Path) -> str:
    with pytest.raises(QkvError) as fault:
        Pickled(folder)
    said = str(fault.value).replace(str(folder), "HERE")
    assert said.isprintable() and len(said) < 400
    return said


# --- what converts ---


@pytest.mark.parametrize("form", [ZIP, LEGACY])
@torch.no_grad()
def test_the_weights_of_a_pickle_convert(form: bool, theirs: Any, folder: Path, tmp_path: Path) -> None:
    torch.save(theirs.state_dict(), folder / BIN, _use_new_zipfile_serialization=form)
    ours = load_published(Pickled(folder))
    ids, valid = texts()
    wanted = published(theirs(ids, attention_mask=valid.long()))
    assert relative(ours(ids, valid=valid), wanted) < 1e-5
    save_pretrained(ours, tmp_path / "new")
    again = load_directory(tmp_path / "new")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]


def test_a_table_may_stand_under_state_dict_and_hold_parameters(theirs: Any, folder: Path) -> None:
    torch.save({"state_dict": OrderedDict(theirs.named_parameters()), "epoch": 3}, folder / BIN)
    plain = load_published(Pickled(folder))
    assert torch.equal(plain.state_dict()["head.out.weight"], theirs.classifier.weight)


def test_several_files_are_one_table(theirs: Any, folder: Path) -> None:
    state = theirs.state_dict()
    first = list(state)[:9]
    torch.save({name: state[name] for name in first}, folder / BIN)
    torch.save({name: x for name, x in state.items() if name not in first}, folder / "more.pt")
    torch.save({"step": 3}, folder / "optimizer.pt")
    (folder / "sub.bin").mkdir()
    assert set(Pickled(folder).keys) == set(state)
    torch.save({first[0]: state[first[0]]}, folder / "third.pth")
    assert refused(folder) == f"HERE/third.pth holds {first[0]}, as another file does: leave one of them in HERE"


def test_the_dtype_is_that_of_most_tensors(folder: Path) -> None:
    torch.save(
        {"a": torch.ones(1), "b": torch.ones(1).half(), "c": torch.ones(2).half(), "n": torch.arange(9)}, folder / BIN
    )
    assert Pickled(folder).dtype == torch.float16
    torch.save({"n": torch.arange(9)}, folder / BIN)
    with pytest.raises(QkvError, match="old holds no tensor of floating-point numbers$"):
        assert Pickled(folder).dtype


# --- what is refused ---


def test_a_directory_of_pickles_is_refused_with_the_command_that_converts_it(folder: Path) -> None:
    for name in (BIN, "model.pt", "model.pth"):
        (folder / BIN).write_bytes(b"never opened")
        (folder / BIN).rename(folder / name)
        said = f"{folder / name} is a pickle, which can run code when it is opened; if you trust it, "
        said += f"`qkv convert {folder} NEW --allow-pickle` reads its weights alone and writes safetensors"
        for read in (Directory, load_directory, opened):
            with pytest.raises(QkvError, match=f"^{re.escape(said)}$"):
                read(folder)
        (folder / name).unlink()


def test_safetensors_count_before_pickles(theirs: Any, folder: Path) -> None:
    theirs.save_pretrained(folder)
    (folder / BIN).write_bytes(b"never opened")
    assert load_directory(folder).count() > 0


@pytest.mark.parametrize("form", [ZIP, LEGACY])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(form: bool, folder: Path) -> None:
    mark = folder / "ran"
    calls = {
        "posix.system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Runs(exec, f"open({str(mark)!r}, 'w')"),
        "io.open": Runs(open, str(mark), "w"),
        "shutil.rmtree": Runs(shutil.rmtree, str(folder)),
        "torch.nn.modules.linear.Linear": torch.nn.Linear(2, 2),
    }
    for name, thing in calls.items():
        for table in ({"weight": thing}, {"a": torch.ones(2), "state_dict": {"b": thing}}, thing):
            (folder / BIN).write_bytes(saved(table, form))
            assert refused(folder) == f"HERE/{BIN} holds more than weights: it asks for {name}, which is not run"
    assert not mark.exists() and (folder / BIN).exists()


def test_a_plain_pickle_that_runs_code_runs_nothing(folder: Path) -> None:
    (folder / BIN).write_bytes(pickle.dumps(Runs(os.system, f"touch {folder / 'ran'}")))
    refused(folder)
    assert not (folder / "ran").exists()


TABLES: dict[str, Any] = {
    "a list": [torch.ones(2)],
    "a tensor": torch.ones(2),
    "a string": "weights",
    "numbers for names": {1: torch.ones(2)},
    "a number beside": {"a": torch.ones(2), "epoch": 3},
    "tables": {"a": {"b": torch.ones(2)}},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "without data": {"a": torch.empty(2**40, device="meta")},
}


@pytest.mark.parametrize("case", TABLES)
def test_what_is_no_table_of_plain_tensors_is_refused(case: str, folder: Path) -> None:
    (folder / BIN).write_bytes(saved(TABLES[case]))
    assert refused(folder) == f"HERE/{BIN} holds no table of names and plain tensors"


def bomb() -> bytes:
    """A zip of 20 KB that unpacks to 20 MB; torch.save never compresses."""
    stream, honest = io.BytesIO(), zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(2)})))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in honest.namelist():
            archive.writestr(name, honest.read(name) if not name.endswith("/data.pkl") else bytes(2 * 10**7))
    return stream.getvalue()


BROKEN = {
    "empty": b"",
    "text": b"not a pickle\n" * 50,
    "a plain pickle": pickle.dumps({"a": 1}),
    "a zip of nothing": b"PK\x05\x06" + bytes(18),
    "half a zip": saved({"a": torch.ones(9)})[:400],
    "half of the old form": saved({"a": torch.ones(9)}, LEGACY)[:-20],
    "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60),
    "a string of 2^60": b"\x80\x04\x8d" + struct.pack("<Q", 2**60),
    "an integer of 2^31": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1),
    "many marks": b"\x80\x02" + b"(" * 10**5,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_is_named(case: str, folder: Path) -> None:
    (folder / BIN).write_bytes(BROKEN[case])
    assert refused(folder) == f"HERE/{BIN} is no file of weights, or is damaged: copy it again, or ask for safetensors"


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(folder: Path) -> None:
    (folder / BIN).write_bytes(bomb())
    assert refused(folder) == f"HERE/{BIN} is compressed, which no file of weights is"


def test_a_folder_without_any_is_named(folder: Path) -> None:
    (folder / BIN).unlink()
    assert refused(folder) == "HERE holds no pickle of weights: no .bin, .pt or .pth file"
    (folder / "config.json").unlink()
    assert refused(folder) == "HERE/config.json does not exist: the folder is incomplete, copy it again"


@given(
    form=st.sampled_from([ZIP, LEGACY]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=5)), min_size=1, max_size=4),
    cut=st.floats(0.5, 1.5),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_a_sentence_or_harmless(
    form: bool, edits: list[tuple[float, bytes]], cut: float, tmp_path: Path
) -> None:
    data = bytearray(saved({"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3)}, form))
    for at, new in edits:
        place = int(at * len(data))
        data[place : place + len(new)] = new
    (tmp_path / "x.bin").write_bytes(data[: int(cut * len(data))])
    try:
        found = weights(tmp_path / "x.bin")
    except QkvError as fault:
        assert str(fault).startswith(str(tmp_path / "x.bin")) and str(fault).isprintable()
    else:
        assert all(isinstance(name, str) and isinstance(x, Tensor) for name, x in found.items())
