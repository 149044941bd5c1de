"""llama2.c's files of version 0, written here in the order of its own export."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qkv.checkpoints.llama2c import Llama2C, read_tokenizer
from qkv.errors import QkvError

DIM, HIDDEN, LAYERS, HEADS, GROUPS, VOCABULARY, LENGTH = 12, 20, 3, 6, 3, 17, 5
HEADER = (DIM, HIDDEN, LAYERS, HEADS, GROUPS, VOCABULARY, LENGTH)
KV = DIM // HEADS * GROUPS


def make(path: Path, shared: bool) -> dict[str, np.ndarray]:
    """Write a model of random weights and give them by name."""
    generator = np.random.default_rng(0)
    weights: dict[str, np.ndarray] = {}
    chunks = [struct.pack("<7i", *HEADER[:5], VOCABULARY if shared else -VOCABULARY, LENGTH)]

    def write(name: str, *shape: int) -> None:
        weights[name] = generator.normal(size=shape).astype("<f4")
        chunks.append(weights[name].tobytes())

    write("model.embed_tokens.weight", VOCABULARY, DIM)
    for name, shape in [
        ("input_layernorm", (DIM,)),
        ("self_attn.q_proj", (DIM, DIM)),
        ("self_attn.k_proj", (KV, DIM)),
        ("self_attn.v_proj", (KV, DIM)),
        ("self_attn.o_proj", (DIM, DIM)),
        ("post_attention_layernorm", (DIM,)),
        ("mlp.gate_proj", (HIDDEN, DIM)),
        ("mlp.down_proj", (DIM, HIDDEN)),
        ("mlp.up_proj", (HIDDEN, DIM)),
    ]:
        for i in range(LAYERS):
            write(f"model.layers.{i}.{name}.weight", *shape)
    write("model.norm.weight", DIM)
    chunks.append(np.full((2, LENGTH, DIM // HEADS // 2), np.nan, "<f4").tobytes())
    if not shared:
        write("lm_head.weight", VOCABULARY, DIM)
    path.write_bytes(b"".join(chunks))
    return weights


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shared", [True, False])
def test_every_weight_is_found(tmp_path, shared):
    weights = make(tmp_path / "model.bin", shared)
    read = Llama2C(str(tmp_path / "model.bin"))
    assert read.tensors == {name: weight.shape for name, weight in weights.items()}
    for name, weight in weights.items():
        np.testing.assert_array_equal(read.tensor(name).numpy(), weight)


@pytest.mark.parametrize("shared", [True, False])
def test_the_config_is_one_that_transformers_takes(tmp_path, shared):
    from transformers import AutoConfig, LlamaForCausalLM

    make(tmp_path / "model.bin", shared)
    read = Llama2C(tmp_path / "model.bin")
    config = AutoConfig.for_model(**read.config)
    assert read.config["architectures"] == ["LlamaForCausalLM"] and config.max_position_embeddings == LENGTH
    assert read.config["tie_word_embeddings"] is shared
    assert (config.rms_norm_eps, config.hidden_act) == (1e-5, "silu") and read.config["rope_theta"] == 10000.0
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert {name: tuple(weight.shape) for name, weight in model.named_parameters()} == read.tensors


def test_a_tensor_is_a_view_that_never_writes_the_file(tmp_path):
    make(tmp_path / "model.bin", True)
    before = (tmp_path / "model.bin").read_bytes()
    read = Llama2C(tmp_path / "model.bin")
    view = read.tensor("model.norm.weight")
    view.fill_(7.0)
    assert read.tensor("model.norm.weight").sum() == 7 * DIM
    assert (tmp_path / "model.bin").read_bytes() == before
    with pytest.raises(QkvError, match="model.bin holds no tensor 'model.nrm.weight'; .*'model.norm.weight'"):
        read.tensor("model.nrm.weight")


@pytest.mark.parametrize(
    ("at", "value", "sentence"),
    [
        (0, 0, "is no file of llama2.c: its header says dim = 0"),
        (0, 13, "its header says dim 13 with 6 heads"),
        (0, 18, "its header says dim 18 with 6 heads"),
        (0, 0x616B3432, "is a llama2.c file of version 20: export it as version 0"),
        (1, -1, "its header says hidden_dim = -1"),
        (1, 2**31 - 1, "by its header it should have"),
        (2, 2**31 - 1, "in 2147483647 layers"),
        (3, 0, "its header says n_heads = 0"),
        (4, 4, "with 6 heads, 4 of keys"),
        (5, 0, "its header says vocab_size = 0"),
        (5, -(2**31), "by its header it should have"),
        (6, 6, "by its header it should have"),
    ],
)
def test_hostile_headers(tmp_path, at, value, sentence):
    path = tmp_path / "model.bin"
    make(path, True)
    content = bytearray(path.read_bytes())
    struct.pack_into("<i", content, 4 * at, value)
    path.write_bytes(content)
    with pytest.raises(QkvError, match=f"model.bin .*{sentence}"):
        Llama2C(path)


def test_files_of_another_length(tmp_path):
    path = tmp_path / "model.bin"
    make(path, True)
    content = path.read_bytes()
    for changed in (b"", content[:27], content[:28], content[:-1], content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(QkvError, match="model.bin (is empty|is no file|has)"):
            Llama2C(path)
    with pytest.raises(QkvError, match="does not exist"):
        Llama2C(tmp_path / "other.bin")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 40), min_size=7, max_size=7), st.integers(0, 4000))
def test_any_header_is_refused_or_read(tmp_path, numbers, length):
    (tmp_path / "fuzz.bin").write_bytes(struct.pack("<7i", *numbers) + bytes(length))
    try:
        read = Llama2C(tmp_path / "fuzz.bin")
    except QkvError as fault:
        assert "fuzz.bin" in str(fault)
    else:
        assert sum(read.tensor(name).numel() for name in read.tensors) * 4 <= length


PIECES = [b"<unk>", b"\n<s>\n", b"", b"\xe5", "字".encode(), b" a"]


def tokenizer(path: Path, longest: int = 5) -> Path:
    entries = [struct.pack("<fi", -i / 2, len(piece)) + piece for i, piece in enumerate(PIECES)]
    path.write_bytes(struct.pack("<i", longest) + b"".join(entries))
    return path


def test_pieces_are_read(tmp_path):
    read = read_tokenizer(tokenizer(tmp_path / "tok.bin"), len(PIECES))
    assert read == (PIECES, [0.0, -0.5, -1.0, -1.5, -2.0, -2.5], 5)
    assert read.pieces == PIECES and read.max_length == 5


def test_tokenizers_that_do_not_fit(tmp_path):
    path = tokenizer(tmp_path / "tok.bin")
    for count, sentence in (
        (len(PIECES) + 1, "ends after 6 pieces, the model has 7"),
        (len(PIECES) - 1, "goes on after the 5 pieces"),
        (0, "cannot be read with a vocabulary of 0"),
        (2**60, "cannot be read with a vocabulary of"),
    ):
        with pytest.raises(QkvError, match=f"tok.bin {sentence}"):
            read_tokenizer(path, count)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(QkvError, match="tok.bin"):
            read_tokenizer(path, len(PIECES))
    for length in (-1, 6, 2**31 - 1):
        changed = bytearray(content)
        struct.pack_into("<i", changed, 8, length)
        path.write_bytes(changed)
        with pytest.raises(QkvError, match=f"tok.bin: piece 0 is {length} bytes long, at most 5"):
            read_tokenizer(path, len(PIECES))
