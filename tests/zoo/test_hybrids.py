"""Hybrids: Jamba and Bamba against the transformers package, and other patterns of mixers against themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from qkv.checkpoints.weights import empty
from qkv.errors import QkvError
from qkv.masks import Causal, Same
from qkv.models import Sequence
from qkv.parts import GLA, GRU, Experts, Retention, Rwkv6
from qkv.spec import edit
from qkv.zoo import PRESETS, spec_from, spec_of
from tests.contracts import specs
from tests.contracts.specs import VOCAB, shrunk
from tests.zoo.pairs import check_edited
from tests.zoo.parity import SIZES, check_export, check_search, check_values, loaded, rough, texts

SPECIAL: dict[str, Any] = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
JAMBA: dict[str, Any] = {
    **SIZES, **SPECIAL, "num_experts": 5, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 7,
    "num_hidden_layers": 4, "experts_implementation": "eager",
}  # fmt: skip
BAMBA: dict[str, Any] = {
    **SIZES, **SPECIAL, "mamba_n_heads": 6, "mamba_d_state": 7, "attn_layer_indices": [1], "mamba_chunk_size": 8,
    "hidden_size": 48,
}  # fmt: skip
MODELS = {
    "jamba": (tf.JambaForCausalLM, tf.JambaConfig, JAMBA),
    "jamba, dense": (tf.JambaForCausalLM, tf.JambaConfig, {**JAMBA, "num_experts": 1, "tie_word_embeddings": True}),
    "jamba, other sizes": (
        tf.JambaForCausalLM, tf.JambaConfig,
        {**JAMBA, "mamba_dt_rank": 5, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_conv_bias": False,
         "mamba_proj_bias": True, "expert_layer_period": 1, "expert_layer_offset": 0, "num_experts_per_tok": 1},
    ),
    "bamba": (tf.BambaForCausalLM, tf.BambaConfig, BAMBA),
    "bamba, other sizes": (
        tf.BambaForCausalLM, tf.BambaConfig,
        {**BAMBA, "mamba_n_groups": 2, "mamba_d_conv": 3, "mamba_expand": 3, "mamba_conv_bias": False,
         "mamba_proj_bias": True, "attn_layer_indices": [0, 2], "attention_bias": True, "tie_word_embeddings": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_values_searches_and_exports_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    kind, config, sizes = MODELS[name]
    theirs = rough(kind(config(**sizes)))
    ours = check_values(theirs, tmp_path / "in", causal=True)
    check_search(theirs, ours, beams=(1,))
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("kind, config, sizes", [
    (tf.JambaModel, tf.JambaConfig, JAMBA), (tf.BambaModel, tf.BambaConfig, BAMBA),
    (tf.JambaForSequenceClassification, tf.JambaConfig, {**JAMBA, "num_labels": 3}),
])  # fmt: skip
def test_other_heads_too(kind: Any, config: Any, sizes: dict[str, Any], tmp_path: Path) -> None:
    theirs = rough(kind(config(**sizes)))
    check_export(theirs, check_values(theirs, tmp_path / "in"), tmp_path / "out")


def test_steps_are_bounded(tmp_path: Path) -> None:
    theirs = rough(tf.BambaForCausalLM(tf.BambaConfig(**BAMBA, time_step_limit=(0.3, 0.8))))
    ours = check_values(theirs, tmp_path / "in")
    assert ours.spec.stack.layers[0].branches["mixer"].f.step_limit == (0.3, 0.8)
    check_export(theirs, ours, tmp_path / "out")


@pytest.mark.parametrize("name, sizes", [
    ("jamba", {"width": 40, "**.inner": 80, "**.rank": 5, "**.attn.f.heads": 4, "**.hidden": 44, "**.vocab": 67}),
    ("bamba", {"width": 40, "**.mixer.f.head_width": 20, "**.mixer.f.heads": 4, "**.attn.f.heads": 2, "**.vocab": 67}),
])  # fmt: skip
def test_an_edited_model_goes_back(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    kind, config, values = MODELS[name]
    theirs = rough(kind(config(**values)))
    check_edited(theirs, loaded(theirs, tmp_path / "in"), tmp_path / "out", texts()[0], **sizes)


def test_the_layers_are_where_the_configuration_says() -> None:
    jamba, bamba = spec_of("jamba-v0.1"), spec_of("bamba-9b")
    assert isinstance(jamba, Sequence) and isinstance(bamba, Sequence)
    assert [n for n, block in enumerate(jamba.stack.layers) if "attn" in block.branches] == [4, 12, 20, 28]
    experts = [n for n, block in enumerate(jamba.stack.layers) if isinstance(block.branches["ffn"].f, Experts)]
    assert experts == list(range(1, 32, 2)) and len(jamba.stack.blocks) == 8
    assert [n for n, block in enumerate(bamba.stack.layers) if "attn" in block.branches] == [9, 18, 27]
    older = {"mamba_dt_rank": "auto", "mamba_inner_layernorms": True, "use_mamba_kernels": True}
    assert spec_from({**PRESETS["jamba-v0.1"](), **older}) == jamba
    assert spec_from({**PRESETS["bamba-9b"](), "mamba_d_head": "auto", "rope_theta": 10000.0}) == bamba


@pytest.mark.parametrize("name, billions", [("jamba-v0.1", 51.57), ("bamba-9b", 9.78)])
def test_the_presets_have_the_published_sizes(name: str, billions: float) -> None:
    values = PRESETS[name]()
    config = (tf.JambaConfig if name == "jamba-v0.1" else tf.BambaConfig).from_dict(values)
    with torch.device("meta"):
        theirs = (tf.JambaForCausalLM if name == "jamba-v0.1" else tf.BambaForCausalLM)(config)
    count = empty(spec_of(name)).count()
    assert count == theirs.num_parameters() and round(count / 1e9, 2) == billions


@pytest.mark.parametrize("name, key, value, said", [
    ("jamba-v0.1", "attn_layer_offset", 8, "attn_layer_offset is 8; a whole number from 0 to 7"),
    ("jamba-v0.1", "hidden_act", "gelu", "hidden_act is 'gelu', for which"),
    ("jamba-v0.1", "mamba_inner_layernorms", False, "mamba_inner_layernorms is False"),
    ("bamba-9b", "attn_layer_indices", [32], "there are 32 layers, from 0"),
    ("bamba-9b", "mamba_d_head", 63, "128 heads of mamba_d_head 63 are not"),
    ("bamba-9b", "mlp_bias", True, "mlp_bias is True"),
])  # fmt: skip
def test_what_has_no_part_is_refused(name: str, key: str, value: Any, said: str) -> None:
    with pytest.raises(QkvError, match=said):
        spec_from({**PRESETS[name](), key: value})


# --- documents that share a row ---

MIXED = {
    "jamba": shrunk("jamba-v0.1"), "bamba": shrunk("bamba-9b"), "samba": shrunk("samba-tiny"),
    "retention and Mamba-2": edit(shrunk("bamba-9b"), "**.attn.f", Retention(4)),
    "GLA, RWKV and GRU": edit(edit(edit(shrunk("jamba-v0.1"), "stack.0.mixer.f", GLA(4)), "stack.1.mixer.f", Rwkv6(4)),
                              "stack.2.attn.f", GRU(12)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", MIXED)
def test_documents_in_one_row_are_as_if_alone(name: str) -> None:
    """In every pattern of mixers, whatever follows whatever, and with padding behind them."""
    packed, alone = specs.rough(edit(MIXED[name], "mask", Causal() & Same())), specs.rough(MIXED[name])
    lengths = [1, 9, 3, 2]
    ids = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(1))
    segments = torch.arange(5).repeat_interleave(torch.tensor([*lengths, 2])).expand(2, -1)
    real = torch.tensor([15, 13])
    found = packed(ids, lengths=real, segments=segments)
    start = 0
    for n in lengths:
        expected = alone(ids[:, start : start + n])
        rows = [0, 1] if start + n <= 13 else [0]
        torch.testing.assert_close(found[rows, start : start + n], expected[rows])
        start += n
