"""Mamba and Mamba-2 against the transformers package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qkv.checkpoints.load import load_directory
from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.parts import Mamba2
from qkv.spec import edit
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.zoo.pairs import check_edited
from tests.zoo.parity import VOCAB, check_export, check_search, check_values, loaded, rough, texts

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 36, "state_size": 7, "num_hidden_layers": 3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TWO = {"num_heads": 6, "head_dim": 12, "n_groups": 2, "chunk_size": 8}


def model(name: str, head: str = "ForCausalLM") -> PreTrainedModel:
    kind, config, changes = {
        "mamba": ("Mamba", tf.MambaConfig, {}),
        "mamba, wide, untied, with biases": (
            "Mamba", tf.MambaConfig,
            {"expand": 3, "conv_kernel": 3, "time_step_rank": 5, "use_bias": True, "use_conv_bias": False,
             "tie_word_embeddings": False},
        ),
        "mamba2": ("Mamba2", tf.Mamba2Config, TWO),
        "mamba2, tied, with biases": (
            "Mamba2", tf.Mamba2Config,
            {**TWO, "n_groups": 1, "conv_kernel": 3, "use_bias": True, "use_conv_bias": False,
             "tie_word_embeddings": True},
        ),
    }[name]  # fmt: skip
    return rough(getattr(tf, f"{kind}{head}")(config(**SIZES, **changes)))


NAMES = ["mamba", "mamba, wide, untied, with biases", "mamba2", "mamba2, tied, with biases"]


@pytest.mark.parametrize("name", NAMES)
def test_values_searches_and_exports_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = model(name)
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_bare_model_too(name: str, tmp_path: Path) -> None:
    theirs = model(name, "Model")
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_steps_are_bounded(tmp_path: Path) -> None:
    config = tf.Mamba2Config(**SIZES, **TWO, time_step_limit=(0.3, 0.8))
    theirs = rough(tf.Mamba2ForCausalLM(config))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    assert ours.spec.stack.pattern.branches["mixer"].f.step_limit == (0.3, 0.8)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("said, limit", [([0.0, float("inf")], None), ([0.0, {"__float__": "Infinity"}], None),
                                         (None, None), ([0.1, float("inf")], (0.1, float("inf")))])  # fmt: skip
def test_infinity_has_two_spellings(said: Any, limit: Any) -> None:
    spec = spec_from({**PRESETS["mamba2-130m"](), "time_step_limit": said})
    mixer = spec.stack.pattern.branches["mixer"].f
    assert isinstance(mixer, Mamba2) and mixer.step_limit == limit


@pytest.mark.parametrize("name, sizes", [
    ("mamba", {"width": 40, "**.inner": 50, "**.state": 9, "**.rank": 4, "stack.depth": 2, "**.vocab": 67}),
    ("mamba2", {"width": 40, "**.heads": 10, "**.head_width": 8, "**.state": 9, "stack.depth": 2, "**.vocab": 67}),
])  # fmt: skip
def test_an_edited_model_goes_back(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    theirs = model(name)
    check_edited(theirs, loaded(theirs, tmp_path / "in"), tmp_path / "out", texts()[0], **sizes)


def test_the_first_files_name_the_table_otherwise(tmp_path: Path) -> None:
    theirs = model("mamba")
    ours = loaded(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_directory(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
def test_the_presets_have_the_published_sizes(name: str) -> None:
    values, kind = PRESETS[name](), "Mamba" if name == "mamba-130m" else "Mamba2"
    with torch.device("meta"):
        theirs = getattr(tf, f"{kind}ForCausalLM")(getattr(tf, f"{kind}Config").from_dict(values))
    assert empty(spec_of(name)).count() == theirs.num_parameters()


def test_older_configurations() -> None:
    older = {
        "d_inner": 1536, "d_model": 768, "fused_add_norm": True, "n_layer": 24, "pad_vocab_size_multiple": 8,
        "rms_norm": True, "ssm_cfg": {}, "time_step_rank": "auto", "intermediate_size": None,
    }  # fmt: skip
    assert spec_from({**PRESETS["mamba-130m"](), **older}) == spec_of("mamba-130m")


def test_heads_that_do_not_fill_the_width_are_refused() -> None:
    with pytest.raises(QkvError, match="24 heads of head_dim 63 are not"):
        spec_from({**PRESETS["mamba2-130m"](), "head_dim": 63})
    assert edit(spec_of("mamba2-130m"), "**.heads", 12) != spec_of("mamba2-130m")
