"""From a spec back to a configuration: whatever is edited comes back, or a sentence says what cannot be said."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.errors import QkvError
from qkv.masks import Full, Window
from qkv.models import Model, Sequence
from qkv.parts import (
    Classifier,
    FeedForward,
    Gated,
    Head,
    LayerNorm,
    LinearScaling,
    Output,
    Pool,
    RMSNorm,
    Rotary,
    Sinusoidal,
    Span,
    Tagger,
    Transform,
)  # fmt: skip
from qkv.spec import diff, edit
from qkv.zoo import PRESETS, spec_from, spec_of
from qkv.zoo.config import DEEPEST
from qkv.zoo.solve import configuration, labels, resized

SMALL: dict[str, dict[str, Any]] = {
    "bert": {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 61, "hidden_size": 36,
        "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 50, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2, "max_position_embeddings": 97,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "tie_word_embeddings": True,
    },
    "llama": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 36,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 50,
        "hidden_act": "silu", "max_position_embeddings": 97, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False, "head_dim": None,
    },
    "qwen3": {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 61, "hidden_size": 36,
        "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 50,
        "hidden_act": "silu", "max_position_embeddings": 97, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "head_dim": 10, "sliding_window": None,
        "use_sliding_window": False, "layer_types": ["full_attention"] * 3,
    },
}  # fmt: skip
POOL = Pool(transform=Transform("tanh"))
NAMES = st.lists(st.sampled_from(["no", "yes", "字", "LABEL_0", ""]), min_size=1, max_size=4).map(tuple)


def heads(kind: str) -> st.SearchStrategy[Output | None]:
    """What may stand on top of a model of a kind."""
    if kind == "bert":
        classes = NAMES.map(lambda names: Classifier(names, pool=POOL, dropout=0.1))
        taggers = NAMES.map(lambda names: Tagger(names, dropout=0.1))
        return st.one_of(st.just(Span()), st.none(), classes, taggers)
    classes = NAMES.map(lambda names: Classifier(names, pool=Pool("last"), bias=False))
    return st.one_of(st.just(Span()), st.none(), st.just(Head(tied=True)), st.just(Head()), classes)


@st.composite
def edited(draw: st.DrawFn, kind: str) -> Sequence:
    """A spec of a kind with some of its numbers and its head changed."""
    spec = spec_from(SMALL[kind])
    assert isinstance(spec, Sequence)
    chosen = draw(st.sets(st.sampled_from(["width", "heads", "hidden", "depth", "vocab", "eps", "act", "head"])))
    if "heads" in chosen:
        spec = edit(spec, "**.attn.f.heads", draw(st.sampled_from([2, 4, 12])))
    if "width" in chosen:
        spec = edit(spec, "width", 12 * draw(st.integers(1, 9)))
    if "hidden" in chosen:
        spec = edit(spec, "**.ffn.f.hidden", draw(st.integers(1, 200)))
    if "depth" in chosen:
        spec = edit(spec, "stack.depth", draw(st.integers(1, 40)))
    if "vocab" in chosen:
        spec = edit(spec, "embed.vocab", draw(st.integers(1, 10**6)))
    if "eps" in chosen:
        eps = draw(st.sampled_from([1e-5, 1e-3, 0.5]))
        for pattern in ("**.pre.eps", "norm.eps", "**.norm.eps") if kind != "bert" else ("**.post.eps", "**.norm.eps"):
            spec = edit(spec, pattern, eps)
    if "act" in chosen:
        spec = edit(spec, "**.ffn.f.act", draw(st.sampled_from(["relu", "gelu-tanh", "silu", "gelu"])))
        if kind == "bert" and isinstance(spec.head, Head):
            spec = edit(spec, "head.transform.act", spec.stack.layers[0].branches["ffn"].f.act)
    if "head" in chosen:
        spec = edit(spec, "head", draw(heads(kind)))
    return spec


def check(spec: Model, base: dict[str, Any]) -> dict[str, Any]:
    values = configuration(spec, base)
    back = spec_from(json.loads(json.dumps(values)))
    assert back == spec, [str(change) for change in diff(back, spec)]
    return values


@pytest.mark.parametrize("kind", SMALL)
@given(st.data())
@settings(max_examples=20, deadline=None)
def test_what_a_family_can_say_comes_back(kind: str, data: st.DataObject) -> None:
    before = json.dumps(SMALL[kind])
    check(data.draw(edited(kind)), SMALL[kind])
    assert json.dumps(SMALL[kind]) == before


@pytest.mark.parametrize("kind", SMALL)
def test_nothing_is_touched_without_need(kind: str) -> None:
    assert configuration(spec_from(SMALL[kind]), SMALL[kind]) == SMALL[kind]


@pytest.mark.parametrize("name", sorted(name for name, make in PRESETS.items() if isinstance(make(), dict)))
def test_every_preset_says_itself(name: str) -> None:
    base = PRESETS[name]()
    assert isinstance(base, dict)
    assert configuration(spec_of(name), base) == base


def test_layers_that_differ_keep_their_pattern() -> None:
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    base = {**SMALL["qwen3"], "layer_types": types, "use_sliding_window": True, "sliding_window": 8}
    spec = spec_from(base)
    assert isinstance(spec, Sequence)
    assert check(edit(spec, "stack.depth", 7), base)["layer_types"] == (types * 3)[:7]
    assert check(edit(spec, "**.mask.size", 5), base)["sliding_window"] == 5


def test_keys_that_a_configuration_leaves_out_may_be_set() -> None:
    base = {key: value for key, value in SMALL["llama"].items() if key not in ("head_dim", "attention_bias")}
    assert check(edit(spec_from(base), "**.attn.f.head_width", 8), base) == {**base, "head_dim": 8}
    gpt2 = PRESETS["gpt2"]()
    assert isinstance(gpt2, dict)
    assert check(edit(spec_from(gpt2), "**.f.hidden", 100), gpt2) == {**gpt2, "n_inner": 100}


def test_resizing_touches_lists_with_an_entry_for_each_layer() -> None:
    values = {"layer_types": ["a", "b"], "other": ["x"], "n": 2}
    assert resized(values, 2, 5) == {"layer_types": ["a", "b", "a", "b", "a"]}
    assert resized(values, 2, 1) == {"layer_types": ["a"]}
    assert resized(values, 2.0, 5) == resized(values, 2, 0) == resized({"empty": []}, 0, 3) == {}


def test_classes_have_names_both_ways_even_equal_ones() -> None:
    spec = spec_from({**SMALL["bert"], "architectures": ["BertForSequenceClassification"]})
    assert labels(edit(spec, "head.labels", ("a", "b", "a"))) == {
        "id2label": {"0": "a", "1": "b", "2": "a"}, "label2id": {"a": 2, "b": 1}
    }  # fmt: skip
    assert labels(spec_from(SMALL["bert"])) == {}


def test_classes_are_named_anew_only_where_they_are_others() -> None:
    base = {**SMALL["bert"], "architectures": ["BertForSequenceClassification"], "num_labels": 2}
    spec = spec_from(base)
    assert configuration(spec, base) == base and "id2label" not in base
    assert check(edit(spec, "head.labels", ("a", "b")), base)["id2label"] == {"0": "a", "1": "b"}


def test_a_count_of_classes_does_not_outlive_them() -> None:
    base = {**SMALL["bert"], "architectures": ["BertForSequenceClassification"], "num_labels": 5}
    assert "num_labels" not in check(edit(spec_from(base), "head.labels", ("a", "b")), base)


@pytest.mark.parametrize("architectures", [None, [], "BertModel", [None], {}])
def test_an_encoder_whose_class_nobody_named_stays_bare(architectures: Any) -> None:
    base = {**SMALL["bert"], "architectures": architectures}
    assert check(edit(spec_from(base), "width", 48), base)["hidden_size"] == 48


UNSAID: dict[str, tuple[str, str, Any, str]] = {
    "a window": ("bert", "**.attn.f.mask", Window(3), "no bert configuration says stack.0.attn.f.mask: Full() → "),
    "another norm": ("llama", "norm", LayerNorm(), "no llama configuration says norm: RMSNorm() → LayerNorm()"),
    "no gate": ("llama", "**.ffn.f", FeedForward(50), "no llama configuration says stack.0.ffn.f: Gated(50"),
    "a gate": ("bert", "**.ffn.f", Gated(50), "no bert configuration says stack.0.ffn.f: FeedForward(50"),
    "one layer only": ("llama", "stack.1.ffn.f.hidden", 51, "no llama configuration says stack.1.ffn.f.hidden: "),
    "sine waves": ("bert", "embed.position", Sinusoidal(), "no bert configuration says embed.position: Learned(97) → "),
    "half a head": ("qwen3", "**.attn.f.position", Rotary(scaling=LinearScaling(2.0)), "no qwen3 configuration says"),
    "no mask": ("llama", "mask", Full(), "no llama configuration says mask: Causal() → Full()"),
    "queries as they are": ("qwen3", "**.attn.f.norm", None, "no qwen3 configuration says stack.0.attn.f.norm: "),
    "a softcap": ("llama", "head.softcap", 30.0, "no llama configuration says head.softcap: None → 30.0"),
    "too deep": ("llama", "stack.depth", DEEPEST + 1, f"no llama configuration says stack.depth: 3 → {DEEPEST + 1}"),
    "two ε": ("llama", "norm", RMSNorm(1e-3), "no llama configuration says norm.eps: 1e-06 → 0.001"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNSAID)
def test_what_a_family_cannot_say_is_a_sentence(case: str) -> None:
    kind, path, value, said = UNSAID[case]
    with pytest.raises(QkvError) as fault:
        configuration(edit(spec_from(SMALL[kind]), path, value), SMALL[kind])
    assert str(fault.value).startswith(said)
