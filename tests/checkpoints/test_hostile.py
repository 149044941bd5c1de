"""Directories that were made to do harm: each ends in one sentence, without memory, time or code of theirs."""

import json
import os
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qkv.checkpoints.directory import LARGEST, MOST, parsed
from qkv.checkpoints.load import load_directory
from qkv.errors import QkvError
from tests.zoo.parity import SIZES, rough

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
ROOM, SECONDS = 400 * 2**20, 60
NAN = float("nan")
SMALL = {**SIZES, "num_hidden_layers": 1}

Spoil = Callable[[Path], Any]


@contextmanager
def limits() -> Iterator[None]:
    """So much memory beyond what the process has, and so many seconds: reached by what does as a file says, no more."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError("it hangs")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def sentence(folder: Path) -> str:
    """What is said of a folder that cannot be loaded, HERE for its path; it is one line of reasonable length."""
    with limits(), pytest.raises(QkvError) as fault:
        load_directory(folder)
    said = str(fault.value).replace(str(folder), "HERE")
    assert said.isprintable() and 20 < len(said) < 900, said
    return said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    rough(tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, num_key_value_heads=2))).save_pretrained(folder / "llama")
    rough(tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, num_key_value_heads=2))).save_pretrained(folder / "qwen3")
    rough(tf.BertForSequenceClassification(tf.BertConfig(**SMALL, num_labels=3))).save_pretrained(folder / "bert")
    return folder


@pytest.fixture
def llama(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "llama", tmp_path / "folder")


# --- config.json ---


def config(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**held, **values}))

    return spoil


def instead(data: bytes, name: str = CONFIG) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data)


def inside(old: str, new: str) -> Spoil:
    """Replace a piece of config.json's text."""

    def spoil(folder: Path) -> None:
        text = (folder / CONFIG).read_text()
        assert old in text
        (folder / CONFIG).write_text(text.replace(old, new))

    return spoil


def moved(make: Callable[[Path], Any], name: str = CONFIG) -> Spoil:
    """Put something that is no file in the place of one."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


SIZED = [
    ("llama", key)
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "head_dim",
    )
]
SIZED += [("bert", key) for key in ("hidden_size", "max_position_embeddings", "type_vocab_size")]  # fmt: skip


@pytest.mark.parametrize(("kind", "key"), SIZED)
@pytest.mark.parametrize(
    "value", [-1, 0, 10**9, 2**31, 2**60, 10**30, 1.5, 36.0, "36", [36], {"a": 1}, True, NAN], ids=str
)
def test_dimensions(kind: str, key: str, value: Any, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / kind, tmp_path / "folder")
    config(**{key: value})(folder)
    assert sentence(folder).startswith("HERE")


@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert"])
@pytest.mark.parametrize("layers", [2, 512, 4096, 10**9])
def test_more_layers_than_tensors(kind: str, layers: int, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / kind, tmp_path / "folder")
    types = {"layer_types": ["full_attention"] * min(layers, 5000)} if kind == "qwen3" else {}
    config(num_hidden_layers=layers, **types)(folder)
    said = sentence(folder)
    assert f"num_hidden_layers is {layers}; a whole number from 1 to" in said if layers > 2 else "it lacks" in said


def test_more_experts_than_any_model_has(llama: Path) -> None:
    config(model_type="mixtral", num_local_experts=2**31, mlp_bias=None, pretraining_tp=None, attention_bias=None)(
        llama
    )
    said = sentence(llama)
    assert "would stack 2,147,483,648 tensors" in said or "no model can have these sizes" in said


ROPES: list[Any] = [
    "linear", [1], 5,
    {"rope_type": "default", "rope_theta": "x"}, {"rope_type": "default", "rope_theta": NAN},
    {"rope_type": "default", "rope_theta": 0}, {"rope_type": "default", "rope_theta": 10**400},
    {"rope_type": "default", "rope_theta": 1e308}, {"rope_type": "default", "zzz": 1}, {"rope_type": ["linear"]},
    {"rope_type": "nope"}, {"full_attention": {"rope_theta": 1e4}},
    *({"rope_type": kind, "factor": factor}
      for kind in ("linear", "dynamic", "yarn") for factor in (0, -1, NAN, "x", 1e308, 5e-324, [1])),
    {"rope_type": "linear", "factor": None}, {"rope_type": "dynamic"},
    *({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": low, "high_freq_factor": high,
       "original_max_position_embeddings": trained}
      for low, high, trained in ((4.0, 4.0, 16), (0, 4.0, 16), (1.0, NAN, 16), (1.0, 4.0, 0), (1.0, 4.0, 10**30),
                                 (1.0, 4.0, "16"), ("1", 4.0, 16))),
    *({"rope_type": "yarn", "factor": 4.0, **more}
      for more in ({"beta_fast": 0}, {"beta_slow": 5e-324}, {"beta_fast": 1e308}, {"beta_fast": 1, "beta_slow": 2},
                   {"attention_factor": NAN}, {"mscale": "x"}, {"truncate": 1})),
    *({"rope_type": "longrope", "short_factor": short, "long_factor": long}
      for short, long in (("x", "x"), ([1.0] * 3, [NAN] * 3), ([1.0] * 2, [1.0] * 3), (["a"] * 3, [1.0] * 3),
                          ([0] * 3, [1.0] * 3), ([10**400] * 3, [1.0] * 3), ([1.0] * 10**5, [1.0] * 10**5))),
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope)[:60])
def test_rotary_tables(rope: Any, llama: Path) -> None:
    config(rope_parameters=rope)(llama)
    sentence(llama)


LAYERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "too many": ("qwen3", {"layer_types": ["full_attention"] * 2}, "layer_types is ['full_attention', "),
    "a million": ("qwen3", {"layer_types": ["full_attention"] * 10**5}, "layer_types holds 100000 values; 512 are the"),
    "numbers": ("qwen3", {"layer_types": [1]}, "layer_types holds 1, which is not of the type str"),
    "nested": ("qwen3", {"layer_types": [["full_attention"]]}, "layer_types holds ['full_attention'], which is not"),
    "unknown": ("qwen3", {"layer_types": ["linear_attention"]}, "layer_types is ['linear_attention'], for which qkv"),
    "a string": ("qwen3", {"layer_types": "full_attention"}, "layer_types is 'full_attention', which is not of"),
    "window 0": ("qwen3", {"layer_types": ["sliding_attention"], "sliding_window": 0}, "sliding_window is 0; a whole"),
    "names": ("bert", {"id2label": "abc"}, "id2label is 'abc', which is not of the type dict"),
    "numbers for names": ("bert", {"id2label": {"0": [1], "1": {}, "2": None}}, "id2label is no table from the"),
    "gaps": ("bert", {"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label is no table from the numbers 0, 1, …"),
    "long numbers": ("bert", {"id2label": {"1" * 5000: "a"}}, "id2label is no table from the numbers 0, 1, …"),
    "another count": ("bert", {"id2label": {"0": "a"}}, "by the configuration head.out.weight has the shape (1, 36), "),
    "classes": ("bert", {"id2label": None, "num_labels": 2**60}, f"num_labels is {2**60}; a whole number from 1 to"),
    "dropout": ("bert", {"hidden_dropout_prob": NAN}, "hidden_dropout_prob is nan; a finite number is expected"),
    "huge ε": ("bert", {"layer_norm_eps": 10**400}, "layer_norm_eps is 10000"),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_lists_and_tables(case: str, made: Path, tmp_path: Path) -> None:
    kind, values, said = LAYERS[case]
    folder = shutil.copytree(made / kind, tmp_path / "folder")
    config(**values)(folder)
    assert said in sentence(folder)


TEXTS: dict[str, tuple[Spoil, str]] = {
    "empty": (instead(b""), "HERE/config.json is not sound JSON (Expecting value: line 1"),
    "cut off": (instead(b'{"model_type": "lla'), "HERE/config.json is not sound JSON (Unterminated string"),
    "a list": (instead(b"[]"), "HERE/config.json is no table of keys and values"),
    "UTF-16": (instead("{}".encode("utf-16")), "HERE/config.json is not sound JSON ('utf-8' codec"),
    "Latin": (instead(b'{"a": "\xff"}'), "HERE/config.json is not sound JSON ('utf-8' codec"),
    "half a character": (instead(b'{"prefix": "\\uD800"}'), "HERE/config.json is not sound JSON ('utf-8' codec"),
    "deep lists": (instead(b"[" * 10**5 + b"]" * 10**5), "is not sound JSON (it is nested too deeply)"),
    "deep tables": (instead(b'{"a":' * 10**5), "is not sound JSON (it is nested too deeply)"),
    "100 MB of brackets": (instead(b"[" * 10**8), "is not sound JSON (it is longer than 16,777,216 bytes)"),
    "many brackets": (instead(b"[" + b"[]," * 5 * 10**6 + b"[]]"), "(it holds more than 262,144 values)"),
    "many numbers": (instead(b"[" + b"1," * 5 * 10**6 + b"1]"), "(it holds more than 262,144 values)"),
    "many digits": (instead(b'{"a": ' + b"1" * 10**6 + b"}"), "is not sound JSON (Exceeds the limit"),
    "a sparse file": (lambda folder: os.truncate(folder / CONFIG, 2**36), "(it is longer than 16,777,216 bytes)"),
    "a key twice": (inside('"hidden_size": 36', '"hidden_size": 36, "hidden_size": 36'), "the key 'hidden_size' twice"),
    "a key twice below": (inside('"rope_theta"', '"rope_type": "x", "rope_theta"'), "the key 'rope_type' twice"),
    "NaN": (inside('"rms_norm_eps": 1e-06', '"rms_norm_eps": NaN'), "HERE/config.json: rms_norm_eps is nan; a finite"),
    "Infinity": (inside('"rms_norm_eps": 1e-06', '"rms_norm_eps": -Infinity'), "rms_norm_eps is -inf; a finite number"),
    "1e999": (inside('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e999'), "rms_norm_eps is inf; a finite number"),
    "a folder": (moved(Path.mkdir), "HERE/config.json does not exist: the folder is incomplete"),
    "a pipe": (moved(os.mkfifo), "HERE/config.json does not exist: the folder is incomplete"),
    "a device": (moved(lambda path: path.symlink_to("/dev/zero")), "HERE/config.json does not exist"),
    "a circle": (moved(lambda path: path.symlink_to(path)), "HERE/config.json does not exist"),
    "no model_type": (config(model_type=None), "HERE/config.json has no model_type, which says what model it is"),
    "a list of them": (config(model_type=["llama"]), "HERE/config.json has no model_type, which says what model it is"),
    "an unknown one": (config(model_type="lama"), "qkv does not know the model_type 'lama'; did you mean 'llama'?"),
    "a long one": (config(model_type="x" * 10**7), "HERE/config.json: qkv does not know the model_type 'xxxxx"),
    "one that draws": (config(model_type="a\n\x1b[2J"), "does not know the model_type 'a\\n\\x1b[2J'"),
    "code": (config(model_type="evil", auto_map={"AutoModel": "m.M"}), "it brings code of its own (auto_map), which"),
    "long keys": (config(**{"k" * 10**6: 1}), "HERE/config.json has keys that this family does not know: 'kkkkk"),
    "long lists": (config(hidden_size=[1] * 10**5), "hidden_size is [1, 1, 1, 1, 1, 1, ...], which is not of"),
    "long numbers": (config(num_hidden_layers=10**4000), "num_hidden_layers is 1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_texts_of_configurations(case: str, llama: Path) -> None:
    spoil, said = TEXTS[case]
    spoil(llama)
    assert said in sentence(llama)


def test_code_beside_a_configuration_is_not_imported(llama: Path) -> None:
    (llama / "evil.py").write_text(f"open({str(llama / 'ran')!r}, 'w')")
    config(auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})(llama)
    load_directory(llama)
    assert not (llama / "ran").exists()


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]",:0123eE.-\\u nulltrefas'), max_size=60).map(str.encode))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_json_or_not(data: bytes) -> None:
    try:
        found = parsed(data)
    except ValueError as fault:
        assert str(fault)
    else:
        assert repr(json.loads(data)) == repr(found)  # nan differs from itself


# --- safetensors ---


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: bytes, data: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def file(change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Change the parsed header, or put bytes in its place."""

    def spoil(data: bytes) -> bytes:
        held, rest = split(data)
        made = change(held)
        return joined(made if isinstance(made, bytes) else json.dumps(made or held).encode(), rest)

    return file(spoil)


def entry(**values: Any) -> Spoil:
    return header(lambda held: held["model.norm.weight"].update(values))


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
LONE = json.dumps(EMPTY).encode()
DAMAGED, UNEVEN = "HERE/model.safetensors is damaged or cut off (", "HERE is no llama model of this configuration: "

FILES: dict[str, tuple[Spoil, str]] = {
    **{f"cut at {n}": (file(lambda data, n=n: data[:n]), DAMAGED) for n in (0, 1, 7, 8, 9, 100, -1, -1000)},
    **{f"a header of {n}": (file(lambda data, n=n: struct.pack("<Q", n) + data[8:]), DAMAGED)
       for n in (0, 1, LARGEST, LARGEST + 1, 2**32, 2**63, 2**64 - 1)},
    "longer": (file(lambda data: data + b"\0" * 100), DAMAGED),
    "much of nothing": (lambda folder: os.truncate(folder / WEIGHTS, 2**28), DAMAGED),
    "overlapping": (entry(data_offsets=[0, 144]), DAMAGED),
    "backwards": (entry(data_offsets=[144, 0]), DAMAGED),
    "negative offsets": (entry(data_offsets=[-144, 0]), DAMAGED),
    "offsets beyond": (entry(data_offsets=[2**40, 2**40 + 144]), DAMAGED),
    "offsets 2^63": (entry(data_offsets=[0, 2**63]), DAMAGED),
    "sizes that overflow": (entry(shape=[2**32, 2**32]), DAMAGED),
    "sizes that come round": (entry(shape=[2**62, 4, 36]), DAMAGED),
    "negative sizes": (entry(shape=[-36]), DAMAGED),
    "half sizes": (entry(shape=[36.0]), DAMAGED),
    "a string for a shape": (entry(shape="36"), DAMAGED),
    "an unknown dtype": (entry(dtype="Q99"), DAMAGED),
    "a number for a dtype": (entry(dtype=5), DAMAGED),
    "whole numbers": (entry(dtype="I32"), "model.norm.weight holds int32, where floating-point numbers are due"),
    "twice as many halves": (entry(dtype="F16", shape=[72]), "has the shape (36,), model.norm.weight makes it (72,)"),
    "many dimensions": (entry(shape=[1] * 10**5 + [36]), "model.norm.weight makes it (1, 1, 1, 1, 1, 1, ...)"),
    "no dimension": (entry(shape=[]), DAMAGED),
    "a name twice": (header(lambda held: json.dumps(held).encode()[:-1] + b', "lm_head.weight": ' + LONE + b"}"),
                     "damaged or cut off (it gives the key 'lm_head.weight' twice)"),
    "no JSON": (header(lambda held: b"x" * 100), DAMAGED),
    "a list": (header(lambda held: b"[]"), DAMAGED),
    "deep": (header(lambda held: b"[" * 10**5), "damaged or cut off (it is nested too deeply)"),
    "deep metadata": (header(lambda held: b'{"__metadata__":' + b'{"a":' * 10**5), "(it is nested too deeply)"),
    "nothing": (file(lambda data: joined(b"{}", b"")), UNEVEN),
    "many names": (header(lambda held: held.update({f"x{n}": EMPTY for n in range(20_000)})),
                   f"{UNEVEN}nothing reads x0, x1, x10, x100 and 19996 more"),
    "too many names": (header(lambda held: held.update({f"x{n}": EMPTY for n in range(50_000)})),
                       f"damaged or cut off (it holds more than {MOST:,} values)"),
    "a long name": (header(lambda held: held.update({"x" * 10**6: EMPTY})), "nothing reads 'xxxxx"),
    "a name that draws": (header(lambda held: held.update({"a\n\x1b[2J": EMPTY})), "nothing reads 'a\\n\\x1b[2J'"),
    "computable ones": (header(lambda held: {f"{n}.rotary_emb.inv_freq": EMPTY for n in range(20_000)}), DAMAGED),
    "a pickle": (instead(b"\x80\x02cos\nsystem\nX\x05\0\0\0touch\x85R." * 10, WEIGHTS), DAMAGED),
    "a zip": (instead(b"PK\x03\x04" + bytes(1000), WEIGHTS), DAMAGED),
    "a folder": (moved(Path.mkdir, WEIGHTS), "HERE has no model.safetensors beside its config.json"),
    "a pipe": (moved(os.mkfifo, WEIGHTS), "HERE has no model.safetensors beside its config.json"),
    "a device": (moved(lambda path: path.symlink_to("/dev/zero"), WEIGHTS), "HERE has no model.safetensors beside its"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_of_weights(case: str, llama: Path) -> None:
    spoil, said = FILES[case]
    spoil(llama)
    assert said in sentence(llama)


@pytest.mark.parametrize("odd", range(1, 8))
def test_data_may_begin_at_any_byte(odd: int, llama: Path, made: Path) -> None:
    """The format asks for no alignment: what other writers leave uneven is read."""
    data, rest = split((llama / WEIGHTS).read_bytes())
    text = json.dumps(data).encode()
    (llama / WEIGHTS).write_bytes(joined(text + b" " * ((odd - len(text)) % 8), rest))
    before, after = load_directory(made / "llama").state_dict(), load_directory(llama).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@given(cut=st.floats(0, 1), edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=8)), max_size=4))
@example(cut=1.0, edits=[(0.0, struct.pack("<Q", 2**64 - 1))])
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_header_is_a_sentence_or_harmless(
    cut: float, edits: list[tuple[float, bytes]], llama: Path, made: Path
) -> None:
    data = bytearray((made / "llama" / WEIGHTS).read_bytes())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for at, new in edits:
        place = int(at * end)
        data[place : place + len(new)] = new
    (llama / WEIGHTS).unlink()  # an older mapping keeps its own file
    (llama / WEIGHTS).write_bytes(data[: int(cut * len(data))] if cut < 0.9 else data)
    try:
        with limits():
            load_directory(llama)
    except QkvError as fault:
        said = str(fault).replace(str(llama), "HERE")
        assert said.startswith("HERE") and said.isprintable() and len(said) < 900, said


# --- an index ---


def index(change: Callable[[dict[str, str], Path], Any]) -> Spoil:
    """Two shards, and an index that is changed."""

    def spoil(folder: Path) -> None:
        held = {name: x.clone() for name, x in load_file(folder / WEIGHTS).items()}
        (folder / WEIGHTS).unlink()
        names = {name: f"{'ab'[n % 2]}.safetensors" for n, name in enumerate(sorted(held))}
        for shard in ("a.safetensors", "b.safetensors"):
            save_file({name: x for name, x in held.items() if names[name] == shard}, folder / shard)
        made = change(names, folder)
        (folder / INDEX).write_text(made if isinstance(made, str) else json.dumps(made))

    return spoil


def points(where: str) -> Spoil:
    return index(lambda names, folder: {"weight_map": {**names, "lm_head.weight": where}})


def twice(names: dict[str, str], folder: Path) -> dict[str, Any]:
    save_file({"lm_head.weight": torch.zeros(61, 36)}, folder / "c.safetensors")
    return {"weight_map": {**names, "model.none": "c.safetensors"}}


def pipe(names: dict[str, str], folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "c.safetensors")
    return {"weight_map": {**names, "x": "c.safetensors"}}


OUTSIDE, NO_MAP = "names files outside of its folder", "has no table weight_map from tensors to files"
INDICES: dict[str, tuple[Spoil, str]] = {
    **{f"outside: {where[:20]!r}": (points(where), OUTSIDE)
       for where in ("../a.safetensors", "/etc/passwd", "sub/a.safetensors", "sub\\a.safetensors", "..", ".", "",
                     "C:a", "a\0b", "a\nb", "x" * 5000)},
    "config.json": (points("config.json"), "HERE/config.json is damaged or cut off ("),
    "a missing file": (points("c.safetensors"), "HERE/c.safetensors does not exist: the folder is incomplete"),
    "a pipe": (index(pipe), "HERE/c.safetensors does not exist: the folder is incomplete"),
    "the other file": (points("b.safetensors"), "HERE/a.safetensors holds 'lm_head.weight', which belongs to another"),
    "a tensor in two files": (index(twice), "holds 'lm_head.weight', which belongs to another file: copy the folder"),
    "a tensor in none": (index(lambda names, folder: {"weight_map": {**names, "ghost": "a.safetensors"}}),
                         "HERE/a.safetensors lacks 'ghost', which model.safetensors.index.json says it holds"),
    "a key twice": (index(lambda names, folder: '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'),
                    "index.json is not sound JSON (it gives the key 'a' twice)"),
    "a list": (index(lambda names, folder: []), "HERE/model.safetensors.index.json is no table of keys and values"),
    **{f"the map {found}": (index(lambda names, folder, found=found: {"weight_map": found}), NO_MAP)
       for found in (None, {}, ["a"], "a", {"a": 1}, {"a": None})},
    "a million": (index(lambda names, folder: '{"weight_map": {' + '"a":"b",' * 10**6 + "}}"), "more than 262,144"),
    "many files": (index(lambda names, folder: {"weight_map": {str(n): f"{n}.safetensors" for n in range(100_000)}}),
                   "HERE/0.safetensors does not exist: the folder is incomplete"),
}  # fmt: skip


@pytest.mark.parametrize("case", INDICES)
def test_indices(case: str, llama: Path) -> None:
    spoil, said = INDICES[case]
    spoil(llama)
    assert said in sentence(llama)


def test_links_are_followed(llama: Path, tmp_path: Path, made: Path) -> None:
    """The Hub's cache is made of links to a folder of blobs: what a file says is checked, not what its owner does."""
    index(lambda names, folder: {"weight_map": names})(llama)
    (llama / "b.safetensors").rename(tmp_path / "blob")
    (llama / "b.safetensors").symlink_to(tmp_path / "blob")
    assert load_directory(llama).spec == load_directory(made / "llama").spec


# --- sentence-transformers ---


def modules(text: Any, pooling: bytes = b'{"pooling_mode_mean_tokens": true}') -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / CONFIG).write_bytes(pooling)
        (folder / "modules.json").write_text(text if isinstance(text, str) else json.dumps(text))

    return spoil


def chain(path: Any = "1_Pooling", kind: Any = "sentence_transformers.models.Pooling") -> list[dict[str, Any]]:
    return [{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": path, "type": kind}]


NO_LIST, PATHS = "HERE/modules.json is no list of modules with a type and a path", "names folders outside of its own"
CHAINS: dict[str, tuple[Spoil, str]] = {
    **{f"path {path!r:.20}": (modules(chain(path)), PATHS)
       for path in ("../x", "/etc", "1_Pooling/../..", ".", "..", "a\0b", "x" * 5000, "a/b")},
    **{f"path {path}": (modules(chain(path)), NO_LIST) for path in (5, None, ["a"])},
    "a missing folder": (modules(chain("2_Pooling")), "HERE/2_Pooling/config.json does not exist"),
    "its own configuration": (modules(chain("")), "HERE/config.json pools by None; one of pooling_mode_cls_token, "),
    "a number for a type": (modules(chain(kind=5)), NO_LIST),
    **{f"the list {text}": (modules(text), NO_LIST) for text in ("5", "null", '{"a": 1}', "[[1]]", '["x"]')},
    "deep": (modules("[" * 10**5), "HERE/modules.json is not sound JSON (it is nested too deeply)"),
    "nothing": (modules("[]"), "HERE/modules.json is a chain of nothing; Transformer, Pooling, Normalize can be run"),
    "another part": (modules(chain(kind="a.Dense")), "is a chain of Transformer, Dense; Transformer, Pooling"),
    "many parts": (modules([{"type": "x" * 500, "path": ""}] * 20_000), "is a chain of 'xxxxx"),
    "no table": (modules(chain(), b"[]"), "HERE/1_Pooling/config.json is no table of keys and values"),
    "no mode": (modules(chain(), b"{}"), "HERE/1_Pooling/config.json pools by None; one of"),
    "an unknown mode": (modules(chain(), b'{"pooling_mode": "median"}'), "1_Pooling/config.json pools by median; one"),
    "a number for a mode": (modules(chain(), b'{"pooling_mode": 5}'), "HERE/1_Pooling/config.json pools by 5; one of"),
    "two modes": (modules(chain(), b'{"pooling_mode_mean_tokens": true, "pooling_mode_max_tokens": true}'),
                  "pools by pooling_mode_mean_tokens, pooling_mode_max_tokens; one of"),
    "another mode": (modules(chain(), b'{"pooling_mode_weightedmean_tokens": true}'), "pools by pooling_mode_weighted"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHAINS)
def test_modules(case: str, llama: Path) -> None:
    spoil, said = CHAINS[case]
    spoil(llama)
    assert said in sentence(llama)
