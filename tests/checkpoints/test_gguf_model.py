"""Models to GGUF and back, against the transformers package's own reader, and from llama2.c."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.gguf import GGUF
from qkv.checkpoints.gguf_export import save_gguf
from qkv.checkpoints.gguf_model import GGUFModel, load_gguf
from qkv.checkpoints.gguf_write import Typed, write_gguf
from qkv.checkpoints.llama2c_model import load_llama2c
from qkv.checkpoints.load import load_directory
from qkv.errors import QkvError
from qkv.models import Module
from qkv.ops.blocks.packed import Packed
from qkv.parts import Pool, Vector
from qkv.spec import edit
from tests.checkpoints.test_gguf_tokenizer import LEVEL, pairs
from tests.zoo.parity import SIZES, VOCAB, relative, rough, texts

ODD: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
EVEN = {**ODD, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 24}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 4.0]}


def llama(**others: Any) -> PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**EVEN, **others}))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(**ODD),
    "llama, tied, with biases": lambda: llama(tie_word_embeddings=True, attention_bias=True),
    "llama 3": lambda: llama(rope_parameters={**LLAMA3, "original_max_position_embeddings": 16}),
    "llama 3.1": lambda: llama(rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192}),
    "llama, slowed": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**ODD, sliding_window=5)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**EVEN, num_local_experts=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**ODD)),
    "qwen2, yarn": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**ODD, rope_parameters=YARN)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**ODD, head_dim=10)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**EVEN, head_dim=10, query_pre_attn_scalar=10, sliding_window=5)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**{**EVEN, "num_hidden_layers": 7}, head_dim=10, query_pre_attn_scalar=10, sliding_window=5)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**EVEN, sliding_window=7)),
    "phi3, long": lambda: tf.Phi3ForCausalLM(
        tf.Phi3Config(**ODD, original_max_position_embeddings=12, rope_parameters=LONG)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_positions=97)),
    "gptneox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**{**SIZES, "hidden_size": 48}, rotary_pct=0.5)),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=VOCAB, hidden_size=36, num_hidden_layers=3)),
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES), add_pooling_layer=False),
}
COST = {"Q8_0": (0.01, 0.1), "Q4_1": (0.1, 0.7)}  # what a type may cost a matrix and these small models' logits


def built(make: Callable[[], PreTrainedModel], folder: Path, std: float = 0.3) -> Module:
    rough(make(), std).save_pretrained(folder)
    return load_directory(folder)


def cost(ours: Tensor, theirs: Tensor) -> float:
    """The root mean square of the difference against theirs."""
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def answer(model: Module) -> Tensor:
    ids = texts()[0]
    return model(ids) if model.head is not None else model.hidden(ids)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    ours = built(MODELS[name], tmp_path / "hf")
    expected = answer(ours)
    report = save_gguf(ours, tmp_path / "m.gguf", type="F32")
    assert set(report.types) == {"F32"} and not report.instead and not report.tokenizer
    back = load_gguf(report.path)
    assert relative(answer(back), expected) < 1e-5
    save_gguf(back, tmp_path / "again.gguf", type="F32")
    before, after = GGUF(report.path), GGUF(tmp_path / "again.gguf")
    assert before.metadata == after.metadata and before.tensors == after.tensors
    assert all(relative(after.tensor(key), before.tensor(key)) < 1e-6 for key in before.tensors)
    save_gguf(ours, tmp_path / "half.gguf")
    half = load_gguf(tmp_path / "half.gguf")
    assert relative(answer(half), expected) < 0.03
    packed = load_gguf(tmp_path / "half.gguf", packed=True)
    assert relative(answer(packed), answer(half)) < 1e-5


@pytest.mark.parametrize("type", COST)
@pytest.mark.parametrize("name", ["llama, tied, with biases", "mixtral", "gemma3", "phi3", "gpt2"])
def test_blocks_cost_little_and_stay_packed(name: str, type: str, tmp_path: Path) -> None:
    ours = built(MODELS[name], tmp_path / "hf", std=0.1)  # at 0.3 a softmax over four heads is a choice, and flips
    report = save_gguf(ours, tmp_path / "m.gguf", type=type)
    plain, packed = load_gguf(report.path), load_gguf(report.path, packed=True)
    before, after = ours.state_dict(), plain.state_dict()
    assert all(cost(after[key], before[key]) <= COST[type][0] for key in before)
    assert cost(answer(plain), answer(ours)) < COST[type][1]
    assert relative(answer(packed), answer(plain)) < 1e-5
    assert packed.state_dict().keys() == plain.state_dict().keys() and packed.spec == plain.spec
    matrices = {key: x for key, x in packed.state_dict().items() if isinstance(x, Packed)}
    assert {x.format for x in matrices.values()} <= {type, "Q8_0", "F16"}
    assert {
        "embed.tokens.weight",
        "stack.0.attn.f.q.weight",
        "stack.2.ffn.f.down" + ".weight" * (name != "mixtral"),
    } <= (matrices.keys())
    assert all(torch.equal(x.dequantise(), after[key]) for key, x in matrices.items())
    again = save_gguf(packed, tmp_path / "again.gguf", type="F32")
    assert relative(answer(load_gguf(again.path)), answer(plain)) < 1e-6


def test_types_follow_llama_cpp(tmp_path: Path) -> None:
    ours = built(lambda: llama(tie_word_embeddings=False, intermediate_size=50), tmp_path / "hf")
    report = save_gguf(ours, tmp_path / "m.gguf", type="Q4_0")
    types = {name: tensor.type for name, tensor in GGUF(report.path).tensors.items()}
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == types["blk.2.ffn_up.weight"] == "Q4_0"
    assert types["output.weight"] == "Q8_0"  # the matrix that makes logits
    assert types["blk.1.ffn_down.weight"] == "F16"  # rows of 50 are no blocks
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    assert report.instead == {"output.weight": "Q8_0", **{f"blk.{i}.ffn_down.weight": "F16" for i in range(3)}}
    assert sum(report.types.values()) == len(types) and report.types["F32"] == 7


ORACLES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: llama(**ODD),
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": MODELS["qwen2"],
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**ODD, head_dim=128)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**ODD, head_dim=256, sliding_window=5)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**{**ODD, "num_hidden_layers": 7}, head_dim=256, sliding_window=5)
    ),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**ODD)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**SMALL, n_positions=1024)),
    "mamba": MODELS["mamba"],
}
TOKENS = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"t{n}" for n in range(VOCAB)],
    "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    theirs = rough(ORACLES[name]())
    theirs.save_pretrained(tmp_path / "hf")
    save_gguf(load_directory(tmp_path / "hf"), tmp_path / "m.gguf", TOKENS, type="F32")
    read = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    with torch.no_grad():
        assert relative(read(texts()[0])[0], theirs(texts()[0])[0]) < 1e-5


def test_a_file_becomes_a_directory(tmp_path: Path) -> None:
    theirs = rough(MODELS["gemma3"]())
    theirs.save_pretrained(tmp_path / "hf")
    save_gguf(load_directory(tmp_path / "hf"), tmp_path / "m.gguf", type="F32")
    save_pretrained(load_gguf(tmp_path / "m.gguf"), tmp_path / "back")
    back = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        assert relative(back(texts()[0])[0], theirs(texts()[0])[0]) < 1e-5


# --- what is refused ---


def rewritten(path: Path, metadata: dict[str, Any], drop: str = "") -> Path:
    """The file with other metadata, and without one tensor."""
    file = GGUF(path)
    tensors = [(name, "F32", file.tensor(name)) for name in file.tensors if name != drop]
    new = path.with_name("new.gguf")
    write_gguf(new, {key: v for key, v in {**file.metadata, **metadata}.items() if v is not None}, tensors)
    return new


@pytest.mark.parametrize(
    "metadata, drop, sentence",
    [
        ({"llama.expert_shared_count": 1}, "", "does not know of this architecture: llama.expert_shared_count"),
        ({"llama.attention.causal": False}, "", "llama.attention.causal is False, for which qkv has no part"),
        ({"llama.vocab_size": 60}, "", "llama.vocab_size is 60, where vocab_size is 61 by the rest"),
        ({"llama.attention.value_length": 8}, "", "value_length is 8, where head_dim is 16"),
        ({"llama.block_count": 4}, "", "lacks blk.3"),
        ({"llama.block_count": 2**31}, "", "block_count is 2147483648, and the file has"),
        ({"llama.attention.head_count": [4, 4, 4]}, "", r"num_attention_heads is \[4, 4, 4\], which is not"),
        ({"llama.embedding_length": None}, "", "lacks the key 'hidden_size'"),
        ({"llama.rope.scaling.type": "dynamic"}, "", "rope.scaling.type is 'dynamic', for which qkv has no part"),
        ({"llama.rope.scaling.type": "yarn"}, "", "factor of yarn is a number above 0"),
        ({"general.architecture": "rwkv7"}, "", "does not know the architecture 'rwkv7'"),
        ({"general.architecture": 3}, "", "has no general.architecture"),
        ({"split.count": 2}, "", "is one of 2 parts of a model"),
        ({}, "blk.1.ffn_norm.weight", "lacks blk.1.ffn_norm.weight"),
        ({"llama.feed_forward_length": 95}, "", "has the shape"),
    ],
)  # fmt: skip
def test_a_file_is_accounted_for_to_the_last_key(
    metadata: dict[str, Any], drop: str, sentence: str, tmp_path: Path
) -> None:
    save_gguf(built(llama, tmp_path / "hf"), tmp_path / "m.gguf", type="F32")
    new = rewritten(tmp_path / "m.gguf", metadata, drop)
    with pytest.raises(QkvError, match=sentence) as fault:
        load_gguf(new)
    assert str(fault.value).startswith(str(new)) and "\n" not in str(fault.value)


def test_a_window_of_nothing_is_none(tmp_path: Path) -> None:
    ours = built(lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**ODD)), tmp_path / "hf")
    save_gguf(ours, tmp_path / "m.gguf", type="F32")
    new = rewritten(tmp_path / "m.gguf", {"phi3.attention.sliding_window": 0})
    assert torch.equal(answer(load_gguf(new)), answer(ours))


def test_models_without_a_form_are_not_written(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ours = built(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**ODD, **windows)), tmp_path / "qwen2")
    with pytest.raises(QkvError, match=r"no form for this qwen2 model, .* stack\.1\.attn\.f\.mask: Window\(5\) → Full"):
        save_gguf(ours, tmp_path / "m.gguf")
    classes = tf.LlamaForSequenceClassification(tf.LlamaConfig(**EVEN, num_labels=3))
    with pytest.raises(QkvError, match=r"no place for head\.out\.weight"):
        save_gguf(built(lambda: classes, tmp_path / "classes"), tmp_path / "m.gguf")
    with pytest.raises(QkvError, match="not as 'Q5_0'"):
        save_gguf(ours, tmp_path / "m.gguf", type="Q5_0")
    roberta = tf.RobertaModel(tf.RobertaConfig(**SIZES), add_pooling_layer=False)
    with pytest.raises(QkvError, match="no form for a 'roberta' model"):
        save_gguf(built(lambda: roberta, tmp_path / "roberta"), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


# --- metadata ---


def test_metadata_is_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    save_gguf(built(llama, tmp_path / "tiny-llama"), tmp_path / "m.gguf", type="BF16")
    said = GGUF(tmp_path / "m.gguf").metadata
    assert said == {
        "general.architecture": "llama", "general.type": "model", "general.name": "tiny-llama", "general.file_type": 32,
        "general.quantization_version": 2, "llama.context_length": 97, "llama.embedding_length": 64,
        "llama.block_count": 3, "llama.feed_forward_length": 96, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 61, "llama.attention.causal": True,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip


def test_a_files_own_words_are_passed_on(tmp_path: Path) -> None:
    metadata = {
        **TOKENS, "tokenizer.ggml.token_type": [3] * VOCAB, "tokenizer.ggml.scores": [0.5] * VOCAB,
        "tokenizer.ggml.merges": [], "tokenizer.ggml.add_bos_token": False, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert save_gguf(built(llama, tmp_path / "hf"), tmp_path / "a.gguf", metadata).tokenizer
    again = rewritten(
        tmp_path / "a.gguf",
        {"general.license": "mit", "tokenizer.ggml.token_type": Typed("int32", [3] * VOCAB)},
    )
    save_gguf(load_gguf(again), tmp_path / "b.gguf", type="Q8_0")
    before, after = GGUF(tmp_path / "a.gguf").metadata, GGUF(tmp_path / "b.gguf").metadata
    tokens = {key: value for key, value in metadata.items() if value != []}
    assert {key: value for key, value in after.items() if key.startswith("tokenizer.")} == tokens
    assert after["general.license"] == "mit" and after["general.name"] == before["general.name"] == "hf"
    assert after["general.file_type"] == 7
    fields, kinds = gguf.GGUFReader(tmp_path / "b.gguf").fields, gguf.GGUFValueType
    assert fields["tokenizer.ggml.token_type"].types == [kinds.ARRAY, kinds.INT32]
    assert fields["tokenizer.ggml.scores"].types == [kinds.ARRAY, kinds.FLOAT32]
    assert fields["llama.block_count"].types == [kinds.UINT32]


def test_the_tokenizer_beside_a_model_goes_with_it(tmp_path: Path) -> None:
    ours = built(llama, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(pairs(LEVEL)))
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ hello }}")
    assert save_gguf(ours, tmp_path / "m.gguf").tokenizer
    said = GGUF(tmp_path / "m.gguf").metadata
    assert len(said["tokenizer.ggml.tokens"]) == VOCAB and said["tokenizer.chat_template"] == "{{ hello }}"


@pytest.mark.parametrize("take, number", [("mean", 1), ("first", 2), ("last", 3)])
def test_what_makes_a_vector_of_a_text_goes_along(take: str, number: int, tmp_path: Path) -> None:
    bert, pool = built(MODELS["bert"], tmp_path / "hf"), Vector(Pool(take))
    model = edit(bert.spec, "head", pool).build().eval()
    model.load_state_dict(bert.state_dict())
    model.origin = bert.origin
    save_gguf(model, tmp_path / "m.gguf", type="F32")
    said = GGUF(tmp_path / "m.gguf").metadata
    assert said["bert.pooling_type"] == number == getattr(gguf.PoolingType, {"first": "CLS"}.get(take, take.upper()))
    assert said["bert.attention.causal"] is False and said["tokenizer.ggml.token_type_count"] == 2
    back = load_gguf(tmp_path / "m.gguf")
    assert back.spec.head == pool and torch.equal(back(texts()[0]), model(texts()[0]))
    save_gguf(back, tmp_path / "again.gguf", type="F32")
    assert GGUF(tmp_path / "again.gguf").metadata == said
    model = edit(bert.spec, "head", Vector(Pool("max"))).build()
    model.origin = bert.origin
    with pytest.raises(QkvError, match="no form for vectors that are the max over"):
        save_gguf(model, tmp_path / "max.gguf")


# --- llama2.c ---


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c(tied: bool, tmp_path: Path) -> None:
    ours = built(lambda: llama(tie_word_embeddings=tied, rms_norm_eps=1e-5), tmp_path / "hf")
    state = ours.state_dict()

    def neighbours(x: Tensor, heads: int) -> Tensor:
        """The rows of each head as its two halves → as pairs, written out."""
        rows = x.view(heads, 2, -1, x.shape[1])
        return torch.stack([rows[:, 0], rows[:, 1]], 2).reshape(x.shape)

    def layers(name: str, heads: int = 0) -> list[Tensor]:
        found = [state[f"stack.{n}.{name}.weight"] for n in range(3)]
        return [neighbours(x, heads) for x in found] if heads else found

    parts = [
        state["embed.tokens.weight"], *layers("attn.pre"), *layers("attn.f.q", 4), *layers("attn.f.k", 2),
        *layers("attn.f.v"), *layers("attn.f.o"), *layers("ffn.pre"), *layers("ffn.f.gate"), *layers("ffn.f.down"),
        *layers("ffn.f.up"), state["norm.weight"], torch.zeros(97, 16), *([] if tied else [state["head.weight"]]),
    ]  # fmt: skip
    header = struct.pack("<7i", 64, 96, 3, 4, 2, VOCAB if tied else -VOCAB, 97)
    (tmp_path / "m.bin").write_bytes(header + b"".join(x.numpy().tobytes() for x in parts))
    model = load_llama2c(tmp_path / "m.bin")
    assert torch.equal(answer(model), answer(ours))


def test_loading_reads_each_tensor_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_gguf(built(MODELS["gemma3"], tmp_path / "hf"), tmp_path / "m.gguf")
    read: list[str] = []
    whole = GGUFModel.tensor

    def counted(self: GGUFModel, key: str) -> Tensor:
        read.append(key)
        return whole(self, key)

    monkeypatch.setattr(GGUFModel, "tensor", counted)
    model = load_gguf(tmp_path / "m.gguf", torch.bfloat16)
    assert sorted(read) == sorted(GGUF(tmp_path / "m.gguf").tensors)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
