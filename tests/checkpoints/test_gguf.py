"""GGUF files against the gguf package, and against files made to do harm."""

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qkv.checkpoints import gguf as ours
from qkv.checkpoints.gguf import GGUF
from qkv.checkpoints.gguf_write import Typed, write_gguf
from qkv.errors import QkvError
from qkv.ops.blocks import BLOCKS, quantise

METADATA = {
    "general.architecture": "llama",
    "int": 7,
    "negative": -7,
    "large": 2**40,
    "float": 1.5,
    "yes": True,
    "text": "字\0\n",
    "empty": "",
    "tokens": ["a", "", "▁字", "<0x0A>"],
    "scores": [0.0, -1.5],
    "bools": [True, False],
    "counts": [1, 2**33],
    "offsets": [-1, 2**31],
    "token_type": Typed("int32", [1, 3, 6]),
    "small": Typed("uint8", 255),
    "double": Typed("float64", 1e-300),
    "none": Typed("string", []),
}
PLAIN = {key: value.value if isinstance(value, Typed) else value for key, value in METADATA.items()}
TYPES = (
    {"int": "UINT32", "negative": "INT32", "large": "UINT64", "float": "FLOAT32", "yes": "BOOL", "text": "STRING"}
    | {"tokens": "STRING", "scores": "FLOAT32", "bools": "BOOL", "counts": "UINT64", "offsets": "INT64"}
    | {"token_type": "INT32", "small": "UINT8", "double": "FLOAT64"}
)


def weights() -> list[tuple[str, str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    types = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
    made = [(f"blk.{type}", type, torch.randn(3, 5, 32, generator=generator)) for type in types]
    return [*made, ("scalar", "F32", torch.tensor(2.5)), ("vector", "F16", torch.arange(7.0))]


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def text(data: bytes | str) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return u64(len(data)) + data


def entry(name: bytes | str = "w", dimensions: tuple[int, ...] = (4, 2), type: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dimensions)) + u64(*dimensions) + u32(type) + u64(offset)


def header(pairs: list[bytes], entries: list[bytes]) -> bytes:
    return b"GGUF" + u32(3) + u64(len(entries), len(pairs)) + b"".join(pairs) + b"".join(entries)


def file(path: Path, pairs: list[bytes], entries: list[bytes], data: int = 4096) -> Path:
    """A file with so many bytes of data, all zero."""
    start = header(pairs, entries)
    path.write_bytes(start + bytes(-len(start) % 32 + data))
    return path


def test_what_is_written_the_reference_reads(tmp_path):
    path = tmp_path / "new" / "model.gguf"
    write_gguf(path, METADATA, iter(weights()))
    reader = gguf.GGUFReader(path)
    for key, value in PLAIN.items():
        field = reader.fields[key]
        assert field.contents() == value, key
        if key in TYPES:
            assert field.types[-1].name == TYPES[key], key
    assert [tensor.name for tensor in reader.tensors] == [name for name, _, _ in weights()]
    for tensor, (_, type, x) in zip(reader.tensors, weights(), strict=True):
        assert tensor.tensor_type.name == type and tensor.shape.tolist() == list(x.shape)[::-1]
        assert tensor.data.tobytes() == quantise(type, x).numpy().tobytes()
    assert [other.name for other in path.parent.iterdir()] == ["model.gguf"]


def test_what_is_written_reads_back(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, weights())
    read = GGUF(str(tmp_path / "a.gguf"))
    assert read.metadata == PLAIN and list(read.metadata) == list(PLAIN)
    for name, type, x in weights():
        tensor = read.tensors[name]
        assert (tensor.name, tensor.shape, tensor.type) == (name, tuple(x.shape), type)
        assert tensor.offset % 32 == 0 and tensor.nbytes == read.data(name).numel()
        assert torch.equal(read.data(name), quantise(type, x).view(-1))
        assert torch.allclose(read.tensor(name), x, atol=0.4) and read.tensor(name).shape == x.shape
    assert torch.equal(read.tensor("blk.BF16", torch.bfloat16), weights()[2][2].bfloat16())


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_what_the_reference_writes_is_read(tmp_path, alignment):
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 65535)
    writer.add_int64("i64", -(2**60))
    writer.add_float64("f64", 0.1)
    writer.add_float32("f32", 0.5)
    writer.add_bool("no", False)
    writer.add_token_list([b"a", b"\xe5\xad", "字"])
    writer.add_token_scores([0.5, -1.0, 2.0])
    writer.add_token_types([1, 2, 3])
    generator = np.random.default_rng(0)
    data = {}
    for type, block in BLOCKS.items():
        data[type] = generator.integers(0, 60, (3, 2 * block.bytes), dtype=np.uint8)
        writer.add_tensor(type, data[type], raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GGUF(path)
    expected = {"i8": -5, "u16": 65535, "i64": -(2**60), "f64": 0.1, "f32": 0.5, "no": False}
    assert expected.items() <= read.metadata.items() and read.metadata["no"] is False
    assert read.metadata["tokenizer.ggml.tokens"] == ["a", "\ufffd", "字"]
    assert read.metadata["tokenizer.ggml.scores"] == [0.5, -1.0, 2.0]
    assert read.metadata["tokenizer.ggml.token_type"] == [1, 2, 3]
    for type, raw in data.items():
        assert read.tensors[type].shape == (3, 2 * BLOCKS[type].weights)
        assert read.data(type).numpy().tobytes() == raw.tobytes()
        theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[type])
        np.testing.assert_array_equal(read.tensor(type).numpy(), theirs)


@pytest.mark.filterwarnings("error")
def test_views_share_the_map_and_never_write_the_file(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.alignment": 128}, [("w", "F32", torch.ones(2, 3)), ("v", "F32", torch.ones(2))])
    before = path.read_bytes()
    read = GGUF(path)
    assert read.tensors["v"].offset == read.tensors["w"].offset + 128 and read.tensors["w"].offset % 128 == 0
    view = read.tensor("w")
    view[0, 0] = 5.0
    assert read.data("w").view(torch.float32)[0] == 5.0
    del read
    assert view.sum() == 10.0 and path.read_bytes() == before


def test_what_is_given_back_is_read_anew(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, weights())
    read = GGUF(tmp_path / "a.gguf")
    before, tensors = read.metadata, {name: read.tensor(name).clone() for name in read.tensors}
    read.release()
    assert read.metadata == before and read.metadata is not before and read.metadata is read.metadata
    assert all(torch.equal(read.tensor(name), tensor) for name, tensor in tensors.items())


def test_tensors_are_taken_one_at_a_time_and_nothing_is_left_of_a_failure(tmp_path):
    path = tmp_path / "a.gguf"
    write_gguf(path, {}, [("w", "F32", torch.ones(3))])
    before = path.read_bytes()
    taken = []

    def tensors():
        for i in range(3):
            taken.append(i)
            yield f"w{i}", "Q8_0", torch.full((1, 32), float("nan") if i == 1 else 1.0)

    with pytest.raises(QkvError, match="a.gguf: tensor 'w1': a weight is not a finite number"):
        write_gguf(path, {}, tensors())
    assert taken == [0, 1]
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / "folder").mkdir()
    with pytest.raises(QkvError, match="folder could not be written"):
        write_gguf(tmp_path / "folder", {}, [])


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"": 1}, "a key must have from 1 to 65535 bytes"),
        ({"k" * 70_000: 1}, "a key must have from 1 to 65535 bytes"),
        ({"k": None}, "the metadata 'k' cannot be written: its type does not follow from NoneType"),
        ({"k": []}, "does not follow from an empty list"),
        ({"k": [1, 2.5]}, "does not follow from float and int"),
        ({"k": [[1]]}, "does not follow from list"),
        ({"k": 2**70}, "the metadata 'k' cannot be written"),
        ({"k": 1e300}, "the metadata 'k' cannot be written"),
        ({"k": "\ud800"}, "the metadata 'k' cannot be written"),
        ({"k": Typed("int8", 128)}, "the metadata 'k' cannot be written"),
        ({"k": Typed("int32", 1.5)}, "the metadata 'k' cannot be written"),
        ({"k": Typed("bool", 1)}, "1 is no bool"),
        ({"k": Typed("int32", ["1"])}, "'1' is no int32"),
        ({"k": Typed("string", 1)}, "1 is no string"),
        ({"k": Typed("array", 1)}, "there is no type 'array'"),
        ({"k": Typed("int", 1)}, "there is no type 'int'"),
        ({"general.alignment": 12}, "general.alignment is 12, not a power of two from 8 on"),
    ],
)
def test_metadata_that_cannot_be_written(tmp_path, metadata, sentence):
    with pytest.raises(QkvError, match=f"a.gguf.*{sentence}"):
        write_gguf(tmp_path / "a.gguf", metadata, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ([("w", "F32", torch.ones(1))] * 2, "'w' is given twice"),
        ([("", "F32", torch.ones(1))], "must have from 1 to 63 bytes"),
        ([("字" * 22, "F32", torch.ones(1))], "must have from 1 to 63 bytes"),
        ([("w", "IQ4_XS", torch.ones(256))], "'w' has the unknown type 'IQ4_XS': use F32"),
        ([("w", "Q4_K", torch.ones(256))], "'w': weights can be written as F32"),
        ([("w", "Q4_0", torch.ones(2, 40))], "'w': rows of 40 weights are not whole blocks of Q4_0"),
        ([("w", "F32", torch.ones(1, 1, 1, 1, 1))], "at most 4 dimensions"),
        ([("w", "F32", torch.ones(2, 0))], "none of them 0"),
    ],
)
def test_tensors_that_cannot_be_written(tmp_path, tensors, sentence):
    with pytest.raises(QkvError, match=f"a.gguf.*{sentence}"):
        write_gguf(tmp_path / "a.gguf", {}, tensors)
    assert not list(tmp_path.iterdir())


HUGE = 2**60
GOOD = header([], [entry()])
HOSTILE_STARTS = {
    "empty": (b"", "is empty"),
    "zip": (b"PK\3\4" + bytes(100), r"this is not a GGUF file: it begins with b'PK.x03.x04'"),
    "short": (b"GG", "this is not a GGUF file"),
    "no version": (b"GGUF\3", "the file ends inside the version, which would reach byte 8 of 5"),
    "version 1": (b"GGUF" + u32(1) + bytes(64), "has GGUF version 1, which is outdated: convert the model anew"),
    "version 2": (b"GGUF" + u32(2) + bytes(64), "has GGUF version 2, which is outdated"),
    "version 4": (b"GGUF" + u32(4) + bytes(64), "has GGUF version 4, only version 3 is known"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(64), "the file is big-endian"),
    "no counts": (b"GGUF" + u32(3) + u64(1), "the file ends inside the counts"),
    "tensors": (b"GGUF" + u32(3) + u64(HUGE, 0), f"claims {HUGE} tensors, at most 65536"),
    "pairs": (b"GGUF" + u32(3) + u64(0, HUGE), f"claims {HUGE} pairs of metadata, at most 65536"),
    "no pair": (b"GGUF" + u32(3) + u64(0, 1), "the file ends inside key 0 of the metadata"),
    "no entry": (b"GGUF" + u32(3) + u64(1, 0), "the file ends inside entry 0 of the tensors"),
    "no data": (GOOD + bytes(-len(GOOD) % 32) + bytes(31), "tensor 'w' would reach byte 128 of 127"),
}
HOSTILE_PAIRS = {
    "long key": (u64(HUGE), f"key 0 of the metadata is {HUGE} bytes long, at most 65535"),
    "key not UTF-8": (text(b"\xff\xff") + u32(4, 1), "key 0 of the metadata is not UTF-8"),
    "type": (text("k") + u32(13), "the value of 'k' has the unknown type 13"),
    "long string": (text("k") + u32(8) + u64(2**63), f"the value of 'k' is {2**63} bytes long"),
    "string past the end": (text("k") + u32(8) + u64(9999), "the file ends inside the value of 'k'"),
    "string not UTF-8": (text("k") + u32(8) + text(b"\xff"), "the value of 'k' is not UTF-8"),
    "bool": (text("k") + u32(7) + b"\2", "the value of 'k' is a bool of 2"),
    "bools": (text("k") + u32(9, 7) + u64(3) + b"\0\1\5", "the value of 'k' is a bool of 5"),
    "long array": (text("k") + u32(9, 4) + u64(HUGE), f"an array of {HUGE}, all arrays together may hold 1700000"),
    "overflowing array": (text("k") + u32(9, 12) + u64(2**61), "the value of 'k' is an array of"),
    "array past the end": (text("k") + u32(9, 4) + u64(1_600_000), "the file ends inside the value of 'k'"),
    "strings past the end": (text("k") + u32(9, 8) + u64(1_600_000), "the file ends inside the value of 'k'"),
    "long string in an array": (text("k") + u32(9, 8) + u64(2, 0, 2**63), "the file ends inside the value of 'k'"),
    "string in an array past the end": (text("k") + u32(9, 8) + u64(1, 5000), "the file ends inside the value of"),
    "deep arrays": (text("k") + (u32(9, 9) + u64(1)) * 300, "the value of 'k' is an array of arrays"),
    "array of an unknown type": (text("k") + u32(9, 77) + u64(1), "the value of 'k' has the unknown type 77"),
}
HOSTILE_PAIRS |= {
    f"alignment {kind} {number}": (text("general.alignment") + u32(TYPE) + value, f"general.alignment is {shown}, not")
    for kind, TYPE, number, value, shown in [
        ("uint32", 4, 0, u32(0), "0"),
        ("uint32", 4, 4, u32(4), "4"),
        ("uint32", 4, 24, u32(24), "24"),
        ("bool", 7, 1, b"\1", "True"),
        ("string", 8, 32, text("32"), "'32'"),
        ("float32", 6, 32, struct.pack("<f", 32), "32.0"),
    ]
}
HOSTILE_ENTRIES = {
    "long name": ([entry("w" * 65)], "entry 0 of the tensors is 65 bytes long, at most 64"),
    "name not UTF-8": ([entry(b"\xff")], "entry 0 of the tensors is not UTF-8"),
    "twice": ([entry(), entry(offset=32)], "the tensor 'w' stands twice"),
    "five dimensions": ([entry(dimensions=(1, 1, 1, 1, 1))], "tensor 'w' has 5 dimensions, at most 4"),
    "many dimensions": ([text("w") + u32(2**32 - 1)], "tensor 'w' has 4294967295 dimensions"),
    "nothing": ([entry(dimensions=(4, 0))], r"tensor 'w' has the shape \(0, 4\), in which nothing can stand"),
    "overflow": ([entry(dimensions=(2**63, 2))], f"tensor 'w' would reach byte {2**66 + 96} of"),
    "overflow to little": ([entry(dimensions=(2**32, 2**32, 2**32, 2**32))], "tensor 'w' would reach byte"),
    "unknown type": ([entry(type=4711)], "tensor 'w': weights of type number 4711 are not supported"),
    "other type": ([entry(type=23)], "tensor 'w': weights of type IQ4_XS are not supported: use F32"),
    "broken rows": ([entry(dimensions=(16, 2), type=2)], "tensor 'w': rows of 16 weights are not whole blocks of Q4_0"),
    "misaligned": ([entry(offset=16)], "tensor 'w' has the offset 16, not a multiple of 32"),
    "past the end": ([entry(offset=2**63)], "tensor 'w' would reach byte"),
    "overlap": ([entry("a", (64,)), entry("b", (4,), offset=64)], "the tensors 'a' and 'b' overlap"),
    "the same bytes": ([entry("a"), entry("b")], "the tensors 'a' and 'b' overlap"),
}


@pytest.mark.parametrize("name", HOSTILE_STARTS)
def test_hostile_starts(tmp_path, name):
    content, sentence = HOSTILE_STARTS[name]
    (tmp_path / "a.gguf").write_bytes(content)
    refuses(tmp_path / "a.gguf", sentence)


@pytest.mark.parametrize("name", HOSTILE_PAIRS)
def test_hostile_metadata(tmp_path, name):
    pair, sentence = HOSTILE_PAIRS[name]
    refuses(file(tmp_path / "a.gguf", [pair], []), sentence)


@pytest.mark.parametrize("name", HOSTILE_ENTRIES)
def test_hostile_tensors(tmp_path, name):
    entries, sentence = HOSTILE_ENTRIES[name]
    refuses(file(tmp_path / "a.gguf", [], entries), sentence)


def refuses(path: Path, sentence: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(QkvError, match=f"a.gguf.* ?{sentence}") as caught:
            GGUF(path)
        assert "\n" not in str(caught.value) and tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


def test_more_refusals(tmp_path):
    same = text("k") + u32(4, 1)
    refuses(file(tmp_path / "a.gguf", [same, same], []), "the key 'k' stands twice")
    array = u32(9, 0) + u64(1_500_000) + bytes(1_500_000)
    arrays = [text(key) + array for key in "ab"]
    refuses(file(tmp_path / "a.gguf", arrays, []), "the value of 'b' is an array of 1500000")
    with (tmp_path / "a.gguf").open("r+b") as sparse:  # a string of 2 GB that is there
        sparse.write(header([text("k") + u32(8) + u64(2**31)], []))
        sparse.truncate(2**32)
    refuses(tmp_path / "a.gguf", "the value of 'k' is 2147483648 bytes long, at most 48000000")
    for path, sentence in ((tmp_path, "is not a file"), (tmp_path / "b.gguf", "b.gguf does not exist")):
        with pytest.raises(QkvError, match=sentence):
            GGUF(path)
    read = GGUF(file(tmp_path / "a.gguf", [], [entry("weight"), entry("scale", (32,), 8, 32)]))
    with pytest.raises(QkvError, match="a.gguf holds no tensor 'wieght'; .*'weight'"):
        read.tensor("wieght")
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[read.tensors["scale"].offset + 1] = 0x7C
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(QkvError, match="a.gguf: tensor 'scale': a scale is not a finite number"):
        GGUF(tmp_path / "a.gguf").tensor("scale")


def test_a_scalar_an_empty_file_and_the_last_byte(tmp_path):
    assert GGUF(file(tmp_path / "a.gguf", [], [], data=0)).tensors == {}
    exact = file(tmp_path / "a.gguf", [], [entry(dimensions=()), entry("x", (1,), offset=32)], data=36)
    assert GGUF(exact).tensor("w").shape == () and GGUF(exact).tensor("x").shape == (1,)
    exact.write_bytes(exact.read_bytes()[:-1])
    refuses(exact, "tensor 'x' would reach byte")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "a.gguf"
    write_gguf(path, METADATA, weights())
    return path.read_bytes()


LENGTHS = st.sampled_from([0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1]) | st.integers(0, 5000)
SPLICES = st.tuples(st.just("splice"), st.integers(0, 1100), LENGTHS)
FLIPS = st.tuples(st.just("flip"), st.integers(0, 4000), st.integers(1, 255))
CUTS = st.tuples(st.just("cut"), st.integers(0, 4000), st.just(0))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(SPLICES | FLIPS | CUTS, min_size=1, max_size=3))
@example([("cut", 0, 0)])
def test_a_damaged_file_is_refused_or_read(tmp_path, sound, damages):
    content = bytearray(sound)
    for kind, at, value in damages:
        at = min(at, len(content))
        if kind == "cut":
            del content[at:]
        elif kind == "splice":
            content[at : at + 8] = u64(value)
        elif at < len(content):
            content[at] ^= value
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        read = GGUF(path)
        for name, tensor in read.tensors.items():
            assert tensor.offset + tensor.nbytes <= len(content) and read.tensor(name).shape == tensor.shape
    except QkvError as fault:
        assert "fuzz.gguf" in str(fault)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20_000_000


def test_every_cut_of_the_header_is_refused(tmp_path, sound):
    path = tmp_path / "cut.gguf"
    path.write_bytes(sound)
    start = min(tensor.offset for tensor in GGUF(path).tensors.values())
    with path.open("r+b") as stream:
        for length in reversed(range(start)):
            stream.truncate(length)
            with pytest.raises(QkvError, match="cut.gguf"):
                GGUF(path)


def test_the_limits_leave_room_for_the_largest_vocabulary():
    assert ours.MOST_VALUES > 1.25 * (3 * 262_144 + 514_906) and ours.LONGEST_HEADER > 2 * 18_000_000
