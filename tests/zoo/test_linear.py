"""RetNet, GLA, DeltaNet, Gated DeltaNet and RWKV-6: files made without qkv, against the formulas token by token.

Names, shapes and keys are those that the flash-linear-attention library (0.6.0) writes.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qkv
from qkv.checkpoints.export import save_pretrained
from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.models import Module
from qkv.spec import dump, edit, load
from qkv.zoo import spec_from, spec_of
from tests.zoo import naive_memories as naive
from tests.zoo.parity import check_state, relative, texts

INERT: dict[str, Any] = {
    "attn": None, "attn_mode": "chunk", "attnres_block_size": None, "fuse_cross_entropy": True, "fuse_norm": True,
    "fuse_linear_cross_entropy": False, "fuse_swiglu": True, "initializer_range": 0.02, "use_l2warp": False,
    "max_position_embeddings": 2048, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "transformers_version": "5.23.0", "dtype": "float32",
}  # fmt: skip
SIZES: dict[str, Any] = {
    **INERT, "vocab_size": 61, "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_heads": 3,
    "hidden_act": "swish", "norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_ratio": 4, "conv_size": 4,
    "expand_v": 1.0, "use_short_conv": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "retnet": {"architectures": ["RetNetForCausalLM"], "expand_k": 1.0, "expand_v": 2.0, "use_short_conv": False,
               "num_kv_heads": None, "feature_map": None, "use_output_gate": True, "elementwise_affine": True},
    "gla": {"architectures": ["GLAForCausalLM"], "expand_k": 0.5, "use_short_conv": False, "num_kv_heads": None,
            "feature_map": None, "use_output_gate": True, "elementwise_affine": True, "clamp_min": None,
            "use_gk": True, "use_gv": False},
    "delta_net": {"architectures": ["DeltaNetForCausalLM"], "expand_k": 1.0, "use_gate": False,
                  "allow_neg_eigval": False, "use_beta": True, "use_output_norm": True, "qk_norm": "l2",
                  "qk_activation": "silu"},
    "gated_deltanet": {"architectures": ["GatedDeltaNetForCausalLM"], "expand_v": 2.0, "head_dim": 8, "use_gate": True,
                       "allow_neg_eigval": False, "num_v_heads": None, "output_gate_activation": "swish"},
    "rwkv6": {"architectures": ["RWKV6ForCausalLM"], "expand_k": 1.0, "hidden_act": "sqrelu", "norm_eps": 1e-5,
              "norm_first": True, "norm_bias": True, "proj_low_rank_dim": 5, "gate_low_rank_dim": 7,
              "hidden_ratio": 3.5},
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "retnet": ("retnet", {}),
    "retnet, narrow, a feature, no gate": (
        "retnet", {"expand_k": 0.5, "expand_v": 1.5, "feature_map": "relu", "use_output_gate": False},
    ),
    "gla": ("gla", {}),
    "gla, convolved, no gate, tied": (
        "gla", {"use_short_conv": True, "conv_size": 3, "use_output_gate": False, "tie_word_embeddings": True},
    ),
    "delta_net": ("delta_net", {}),
    "delta_net, gated, to −1": (
        "delta_net", {"use_gate": True, "allow_neg_eigval": True, "expand_v": 2.0, "conv_size": 3},
    ),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet, in groups": (
        "gated_deltanet",
        {"num_v_heads": 6, "output_gate_activation": "sigmoid", "allow_neg_eigval": True, "expand_v": 1.5},
    ),
    "gated_deltanet, no gate": ("gated_deltanet", {"use_gate": False}),
    "rwkv6": ("rwkv6", {}),
    "rwkv6, no norm first": ("rwkv6", {"norm_first": False, "norm_bias": False, "tie_word_embeddings": True}),
}  # fmt: skip


def config(kind: str, **changes: Any) -> dict[str, Any]:
    keys = {**SIZES, **KINDS[kind], "model_type": kind, **changes}
    if kind == "rwkv6":
        keys = {key: value for key, value in keys.items() if key not in ("conv_size", "use_short_conv", "fuse_swiglu")}
    return keys


def written(values: dict[str, Any], folder: Path, weights: naive.Weights | None = None) -> Module:
    """A directory as it is published, loaded."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights or naive.random(values), folder / "model.safetensors", metadata={"format": "pt"})
    return qkv.load(folder)


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_library_loads_computes_and_goes_back(name: str, tmp_path: Path) -> None:
    kind, changes = OTHERS[name]
    values = config(kind, **changes)
    weights = naive.random(values)
    model = written(values, tmp_path / "in", weights)
    assert load(dump(model.spec)) == model.spec
    ids, valid = texts(3)
    expected = torch.stack([naive.logits(values, weights, row) for row in ids])
    assert relative(model(ids).double(), expected) < 1e-5
    right = model(ids.where(valid, 0), valid=valid).double()
    assert relative(right[valid], expected[valid]) < 1e-5
    check_state(model, ids)
    save_pretrained(model, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(tensor, again[key]) for key, tensor in weights.items())
    assert spec_from(json.loads((tmp_path / "out" / "config.json").read_text())) == model.spec


@torch.no_grad()
@pytest.mark.parametrize("name, sizes", [
    ("retnet", {"width": 48, "**.heads": 4, "**.key_width": 12, "**.value_width": 24, "**.hidden": 44}),
    ("gla", {"width": 48, "**.heads": 4, "**.key_width": 6, "**.value_width": 12, "stack.depth": 3}),
    ("gated_deltanet", {"**.heads": 4, "**.key_width": 10, "**.value_width": 20}),
    ("rwkv6", {"width": 48, "**.heads": 4, "**.mix_rank": 3, "**.decay_rank": 6, "**.vocab": 67}),
])  # fmt: skip
def test_an_edited_model_goes_back(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    values = config(name)
    spec = spec_from(values)
    made = written(values, tmp_path / "in")
    for pattern, value in sizes.items():
        spec = edit(spec, pattern, value)
    other = spec.build().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.normal_(std=0.3, generator=generator)
    other.origin = made.origin
    save_pretrained(other, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    weights, (ids, _) = load_file(tmp_path / "out" / "model.safetensors"), texts(2)
    expected = torch.stack([naive.logits(values, weights, row) for row in ids])
    assert relative(other(ids).double(), expected) < 1e-5


def test_a_body_alone_has_no_prefix_and_no_head(tmp_path: Path) -> None:
    values = {**config("gla"), "architectures": ["GLAModel"]}
    weights = {key: value for key, value in naive.random(values).items() if key != "lm_head.weight"}
    model = written(values, tmp_path, {key.removeprefix("model."): value for key, value in weights.items()})
    assert model.head is None
    assert torch.equal(model.state_dict()["stack.1.ffn.f.up.weight"], weights["model.layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize("name, billions", [
    ("retnet-1.3b", 1.35), ("gla-1.3b", 1.37), ("delta-net-1.3b", 1.37), ("gated-delta-net-1.3b", 1.39),
    ("rwkv6-1.6b", 1.60),
])  # fmt: skip
def test_the_presets_have_the_published_sizes(name: str, billions: float) -> None:
    assert round(empty(spec_of(name)).count() / 1e9, 2) == billions


@pytest.mark.parametrize("kind, width", [("retnet", 2816), ("gla", 5632), ("delta_net", 5632), ("rwkv6", 7168)])
def test_a_feed_forward_of_no_said_width_is_rounded_up(kind: str, width: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 2048, "num_heads": 8, "intermediate_size": None}
    ratio = {} if kind != "retnet" else {"hidden_ratio": 2}
    spec = spec_from(config(kind, **sizes, **ratio))
    assert spec.stack.pattern.branches["ffn"].f.hidden == width


@pytest.mark.parametrize("kind, key, value, said", [
    ("retnet", "use_short_conv", True, "use_short_conv is True, for which"),
    ("retnet", "num_kv_heads", 1, "num_kv_heads is 1, for which"),
    ("retnet", "fuse_norm", False, "fuse_norm is False, for which"),
    ("retnet", "expand_k", 0.3, "expand_k × hidden_size is 10.8, which 3 heads cannot share"),
    ("gla", "attn", {"layers": [1], "num_heads": 2}, "attn is .*, for which"),
    ("gla", "clamp_min", -1.0, "clamp_min is -1.0, for which"),
    ("gla", "feature_map", "relu", "feature_map is 'relu', for which"),
    ("delta_net", "qk_norm", "sum", "qk_norm is 'sum', for which"),
    ("delta_net", "use_short_conv", False, "use_short_conv is False, for which"),
    ("gated_deltanet", "expand_v", 1.3, "expand_v × head_dim is 10.4, no whole number"),
    ("rwkv6", "expand_k", 0.5, "expand_k is 0.5; qkv runs"),
    ("rwkv6", "hidden_act", "swish", "hidden_act is 'swish', for which"),
    ("gla", "attnres_block_size", 2, "attnres_block_size is 2, for which"),
])  # fmt: skip
def test_what_has_no_part_is_refused(kind: str, key: str, value: Any, said: str) -> None:
    with pytest.raises(QkvError, match=said):
        spec_from(config(kind, **{key: value}))
