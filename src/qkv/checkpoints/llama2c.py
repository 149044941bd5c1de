"""llama2.c's model file of version 0 and its tokenizer file, read in place.

    model      =  dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len as i32 · weights as f32
    tokenizer  =  longest piece i32 · for each piece: score f32 · length i32 · bytes

A negative vocab_size says that the classifier has weights of its own. All layers of one kind of weight stand together:
the embedding, then norms, queries, keys, values and outputs of attention, norms and w1, w2, w3 of the feed-forward,
the last norm, two tables of rotary angles that can be computed, and the classifier.
"""

import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.checkpoints.gguf import mapped
from qkv.errors import QkvError
from qkv.spec import nearest

HEADER = struct.Struct("<7i")
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "seq_len")
LATER = 0x616B3432  # "ak42": how files of version 1 and 2 begin
MOST_LAYERS, MOST_PIECES = 4096, 1_000_000


class Llama2C:
    """A model file of llama2.c, version 0: `config` and `tensors` (shapes) under the names that Hugging Face uses.

    The rows of q_proj and k_proj stand as in the file, where the two members of a rotary pair are neighbours in a
    head; Hugging Face's order keeps them half a head apart. Whoever maps the names reorders the rows. Raises QkvError
    for a file whose header is not one or does not fit its length.
    """

    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map = mapped(self.path)
        header = self._header()
        self.config = _config(header)
        self._offsets: dict[str, int] = {}
        self.tensors = {}
        at = HEADER.size
        for name, shape in _layout(header):
            if not name.startswith("freq_cis"):
                self.tensors[name], self._offsets[name] = shape, at
            at += 4 * prod(shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32: a view of the mapped file; writing into it never reaches the file."""
        if name not in self.tensors:
            raise QkvError(f"{self.path} holds no tensor {name!r}{nearest(name, self.tensors)}")
        shape = self.tensors[name]
        flat = torch.frombuffer(self._map, dtype=torch.float32, count=prod(shape), offset=self._offsets[name])
        return flat.view(shape)

    def _header(self) -> dict[str, int]:
        if len(self._map) < HEADER.size:
            raise QkvError(f"{self.path} is no file of llama2.c: it has {len(self._map)} bytes, not even a header")
        numbers = HEADER.unpack_from(self._map)
        if numbers[0] == LATER:
            raise QkvError(f"{self.path} is a llama2.c file of version {numbers[1]}: export it as version 0")
        header = dict(zip(FIELDS, numbers, strict=True))
        dim, heads, groups = header["dim"], header["n_heads"], header["n_kv_heads"]
        wrong = [name for name in FIELDS if header[name] <= 0 and name != "vocab_size"]
        if wrong or header["vocab_size"] == 0:
            name = wrong[0] if wrong else "vocab_size"
            raise QkvError(f"{self.path} is no file of llama2.c: its header says {name} = {header[name]}")
        if dim % heads or dim // heads % 2 or heads % groups or header["n_layers"] > MOST_LAYERS:
            raise QkvError(
                f"{self.path} is no file of llama2.c: its header says dim {dim} with {heads} heads, {groups} of keys, "
                f"in {header['n_layers']} layers"
            )
        expected = HEADER.size + 4 * sum(prod(shape) for _, shape in _layout(header))
        if len(self._map) != expected:
            raise QkvError(
                f"{self.path} has {len(self._map)} bytes, by its header it should have {expected}: it is cut off or no "
                "file of llama2.c of version 0"
            )
        return header


def _config(header: dict[str, int]) -> dict[str, Any]:
    """What Hugging Face's config.json would say."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": header["dim"],
        "intermediate_size": header["hidden_dim"],
        "num_hidden_layers": header["n_layers"],
        "num_attention_heads": header["n_heads"],
        "num_key_value_heads": header["n_kv_heads"],
        "vocab_size": abs(header["vocab_size"]),
        "max_position_embeddings": header["seq_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": header["vocab_size"] > 0,
    }


def _layout(header: dict[str, int]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the file's order."""
    dim, hidden, layers, heads, groups, vocabulary, length = header.values()
    head, vocabulary, shared = dim // heads, abs(vocabulary), vocabulary > 0

    def each(name: str, *shape: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"model.layers.{i}.{name}.weight", shape) for i in range(layers)]

    return [
        ("model.embed_tokens.weight", (vocabulary, dim)),
        *each("input_layernorm", dim),
        *each("self_attn.q_proj", dim, dim),
        *each("self_attn.k_proj", groups * head, dim),
        *each("self_attn.v_proj", groups * head, dim),
        *each("self_attn.o_proj", dim, dim),
        *each("post_attention_layernorm", dim),
        *each("mlp.gate_proj", hidden, dim),
        *each("mlp.down_proj", dim, hidden),
        *each("mlp.up_proj", hidden, dim),
        ("model.norm.weight", (dim,)),
        ("freq_cis_real", (length, head // 2)),
        ("freq_cis_imag", (length, head // 2)),
        *([] if shared else [("lm_head.weight", (vocabulary, dim))]),
    ]


class Pieces(NamedTuple):
    """A vocabulary of SentencePiece: the bytes and score of each piece, and the length of the longest in bytes."""

    pieces: list[bytes]
    scores: list[float]
    max_length: int


def read_tokenizer(path: Path | str, vocab_size: int) -> Pieces:
    """The pieces of llama2.c's tokenizer.bin, whose number only the model knows; QkvError where it does not fit."""
    path = Path(path)
    if not 0 < vocab_size <= MOST_PIECES:
        raise QkvError(f"{path} cannot be read with a vocabulary of {vocab_size} pieces")
    source, entry = mapped(path), struct.Struct("<fi")
    (longest,), at = struct.unpack_from("<i", source) if len(source) >= 4 else (0,), 4
    pieces: list[bytes] = []
    scores: list[float] = []
    for i in range(vocab_size):
        if at + entry.size > len(source):
            raise QkvError(f"{path} ends after {i} pieces, the model has {vocab_size}: it is cut off or another's")
        score, length = entry.unpack_from(source, at)
        at += entry.size
        if not 0 <= length <= min(longest, len(source) - at):
            raise QkvError(f"{path}: piece {i} is {length} bytes long, at most {longest} of {len(source) - at} can be")
        pieces.append(source[at : at + length])
        scores.append(score)
        at += length
    if at != len(source):
        raise QkvError(f"{path} goes on after the {vocab_size} pieces that the model has: it is another model's")
    return Pieces(pieces, scores, longest)
