"""Reading a configuration key by key, and from it a spec: values by their type and range, every key accounted for."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkv.checkpoints.names import parse
from qkv.checkpoints.weights import Unfilled, empty
from qkv.errors import QkvError
from qkv.models import Model
from qkv.parts.activation import activation
from qkv.zoo import FAMILIES, PRESETS, family_of, spec_from
from qkv.zoo.config import ACTIVATIONS, DEEPEST, MOST, Config
from qkv.zoo.registry import family, preset

Ask = Callable[[Config], Any]


def fault(values: dict[str, Any], ask: Ask, keys: tuple[str, ...] = ()) -> str:
    with pytest.raises(QkvError) as raised:
        ask(Config(values, keys, "here"))
    return str(raised.value)


TAKEN: list[tuple[Any, Ask, Any]] = [
    (7, lambda c: c.integer("k"), 7),
    (0, lambda c: c.integer("k", least=0), 0),
    (None, lambda c: c.integer("k", 5), 5),
    (None, lambda c: c.optional("k"), None),
    (3, lambda c: c.optional("k"), 3),
    (12, lambda c: c.depth("k"), 12),
    (0.5, lambda c: c.number("k"), 0.5),
    (2, lambda c: c.number("k"), 2.0),
    (-1e9, lambda c: c.number("k"), -1e9),
    (0, lambda c: c.number("k"), 0.0),
    (True, lambda c: c.flag("k"), True),
    (None, lambda c: c.flag("k", False), False),
    ("x", lambda c: c.text("k"), "x"),
    ("gelu_new", lambda c: c.act("k"), "gelu-tanh"),
    (None, lambda c: c.act("k", "swish"), "silu"),
    ([1, 2], lambda c: c.list("k", int), [1, 2]),
    ([1, 2.5], lambda c: c.list("k", float, 2), [1.0, 2.5]),
    (None, lambda c: c.list("k", int), []),
    ({"a": 1}, lambda c: c.table("k").integer("a"), 1),
    (None, lambda c: c.table("k").values, {}),
    (4, lambda c: c.only("k", 3, 4), None),
    (None, lambda c: c.only("k", 3), None),
]


@pytest.mark.parametrize(("value", "ask", "wanted"), TAKEN)
def test_values_are_taken(value: Any, ask: Ask, wanted: Any) -> None:
    config = Config({"k": value, "also": 1})
    found = ask(config)
    assert found == wanted and type(found) is type(wanted)
    config.ignore("also")
    config.close()


def test_a_number_is_one_even_where_it_was_written_whole() -> None:
    assert type(Config({"k": 2}).number("k")) is float
    assert [type(x) for x in Config({"k": [2, 3]}).list("k", float)] == [float, float]


REFUSED: list[tuple[Any, Ask, str]] = [
    (None, lambda c: c.integer("k"), "here lacks the key 'k'"),
    (0, lambda c: c.integer("k"), "here: k is 0; a whole number from 1 to 2,147,483,648 is expected"),
    (-3, lambda c: c.integer("k"), "here: k is -3; a whole number from 1 to 2,147,483,648 is expected"),
    (MOST + 1, lambda c: c.optional("k"), f"here: k is {MOST + 1}; a whole number from 1 to 2,147,483,648 is expected"),
    (9, lambda c: c.integer("k", most=8), "here: k is 9; a whole number from 1 to 8 is expected"),
    (2.0, lambda c: c.integer("k"), "here: k is 2.0, which is not of the type int"),
    (True, lambda c: c.integer("k"), "here: k is True, which is not of the type int"),
    ("2", lambda c: c.number("k"), "here: k is '2', which is not of the type float"),
    (float("nan"), lambda c: c.number("k"), "here: k is nan; a finite number is expected, which fp32 can hold"),
    (float("-inf"), lambda c: c.number("k"), "here: k is -inf; a finite number is expected, which fp32 can hold"),
    (1e300, lambda c: c.number("k"), "here: k is 1e+300; a finite number is expected, which fp32 can hold"),
    (1e-300, lambda c: c.number("k"), "here: k is 1e-300; a finite number is expected, which fp32 can hold"),
    (10**400, lambda c: c.number("k"), "here: k is 100000000000000000...0000000000000000000, which is not of the type"),
    (1, lambda c: c.flag("k"), "here: k is 1, which is not of the type bool"),
    (["x"], lambda c: c.text("k"), "here: k is ['x'], which is not of the type str"),
    ("gelu_neu", lambda c: c.act("k"), "here: k is 'gelu_neu'; did you mean 'gelu_new'?"),
    ({}, lambda c: c.list("k", int), "here: k is {}, which is not of the type list"),
    ([1, "x"], lambda c: c.list("k", int), "here: k holds 'x', which is not of the type int"),
    ([1], lambda c: c.list("k", int, 2), "here: k holds 1 values; 2 are expected"),
    (None, lambda c: c.list("k", int, 2), "here: k holds 0 values; 2 are expected"),
    (
        [1] * 10**5,
        lambda c: c.list("k", int),
        f"here: k holds 100000 values; {DEEPEST} are the most that a model needs",
    ),
    ([], lambda c: c.table("k"), "here: k is [], which is not of the type dict"),
    ({"a": 0}, lambda c: c.table("k").integer("a"), "here: k: a is 0; a whole number from 1 to"),
    ({"a": 0}, lambda c: c.table("k").close(), "here: k has keys that this family does not know: 'a'; ignoring them"),
    (5, lambda c: c.only("k", 3, 4), "here: k is 5, for which qkv has no part; it runs 3 or 4"),
    ({"b": 1}, lambda c: c.only("k"), "here: k is {'b': 1}, for which qkv has no part; it runs nothing"),
    (
        5,
        lambda c: c.close(),
        "here has keys that this family does not know: 'k'; ignoring them could run another model",
    ),
]


@pytest.mark.parametrize(("value", "ask", "said"), REFUSED)
def test_other_values_are_refused(value: Any, ask: Ask, said: str) -> None:
    assert fault({"k": value}, ask).startswith(said)


def test_layers_are_no_more_than_tensors() -> None:
    assert "from 1 to 3 is" in fault({"k": 4}, lambda c: c.depth("k"), keys=("a", "b", "c"))
    assert f"from 1 to {DEEPEST} is" in fault({"k": DEEPEST + 1}, lambda c: c.depth("k"))


@pytest.mark.parametrize("long", ["x" * 10**6, [[0] * 1000] * 1000, {str(n): n for n in range(10**5)}])
def test_sentences_stay_short_whatever_stands_there(long: Any) -> None:
    asks: list[Ask] = [lambda c: c.integer("k"), lambda c: c.only("k", 1), lambda c: c.act("k")]
    assert all(len(fault({"k": long}, ask)) < 300 for ask in asks)
    assert len(fault({"k" * 10**6: 1}, lambda c: c.close())) < 300


def test_a_configuration_is_a_table() -> None:
    values: Any = [1]
    with pytest.raises(QkvError, match="^here is no table of keys and values$"):
        Config(values, (), "here")


def test_null_is_absent() -> None:
    config = Config({"k": None, "more": None})
    assert "k" not in config and config.integer("k", 3) == 3
    config.close()


# --- what several families ask ---


@pytest.mark.parametrize(
    ("architectures", "task"),
    [
        (["BertForMaskedLM"], "MaskedLM"), (["GPT2LMHeadModel"], "CausalLM"), (["BertModel"], ""), (None, ""), ([], ""),
        ("BertForMaskedLM", ""), ([["x"]], ""), ([None], ""), ({"0": "AForCausalLM"}, ""),
        (["LlamaForCausalLM", "BertModel"], "CausalLM"),
    ],
)  # fmt: skip
def test_the_class_says_what_a_model_is_for(architectures: Any, task: str) -> None:
    assert Config({"architectures": architectures}).task == task


LABELS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ("LABEL_0", "LABEL_1")),
    ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    (
        {"id2label": {str(n): f"is {n}" for n in (10, 9, 2, 1, 0, 3, 4, 5, 6, 7, 8)}},
        tuple(f"is {n}" for n in range(11)),
    ),
    ({"id2label": {0: "no", 1: "no"}}, ("no", "no")),
    ({"id2label": {"0": 5, "1": True}}, ("5", "True")),
    ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
]


@pytest.mark.parametrize(("values", "labels"), LABELS)
def test_classes_have_names(values: dict[str, Any], labels: tuple[str, ...]) -> None:
    assert Config(values).labels() == labels


@pytest.mark.parametrize(
    "names",
    [
        5, "ab", ["a"], True, {"a": "b"}, {"1": "a"}, {"0": "a", "00": "b"}, {"-1": "a", "0": "b"}, {"0": None},
        {"0": ["a"]}, {"0": "a", "9" * 30: "b"}, {"1" * 5000: "a"}, {"": "a"},
    ],
)  # fmt: skip
def test_what_is_no_table_of_names_is_refused(names: Any) -> None:
    assert fault({"id2label": names}, lambda c: c.labels()).startswith("here: id2label is ")


@pytest.mark.parametrize("count", [0, -1, 2**17, 2**60, "3", 3.0, [3]])
def test_a_count_of_classes_is_a_whole_number(count: Any) -> None:
    for values in ({"num_labels": count}, {"num_labels": count, "id2label": {"0": "a"}}):
        assert fault(values, lambda c: c.labels()).startswith("here: num_labels is ")


def test_a_head_is_tied_where_it_is_said_or_has_no_matrix() -> None:
    assert Config({}, ("a",)).tied("w", False) and not Config({}, ("w",)).tied("w", False)
    assert Config({"tie_word_embeddings": True}, ("w",)).tied("w") and Config({}, ("w",)).tied("w")
    assert not Config({"tie_word_embeddings": False}, ()).tied("w")


# --- families ---


def test_a_family_is_found_by_its_kind() -> None:
    assert family_of({"model_type": "llama"}).kind == "llama"
    for kind in (None, 5, ["llama"], {"a": 1}):
        with pytest.raises(QkvError, match="^here has no model_type, which says what model it is$"):
            family_of({"model_type": kind}, "here")
    with pytest.raises(QkvError, match=r"^here: qkv does not know the model_type 'lama'; did you mean 'llama'\?$"):
        family_of({"model_type": "lama"}, "here")
    with pytest.raises(
        QkvError, match=re.escape("'evil'; it brings code of its own (auto_map), which qkv never runs;")
    ):
        family_of({"model_type": "evil", "auto_map": {"AutoModel": "evil.Model"}}, "here")


def test_code_that_a_configuration_brings_is_never_looked_for() -> None:
    values = PRESETS["bert-tiny"]()
    assert isinstance(values, dict)
    assert spec_from({**values, "auto_map": {"AutoModel": "evil--code.Model"}}) == spec_from(values)


REMARKS: dict[str, dict[str, Any]] = {
    "bert-base": {
        "directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128, "pooler_type": "first_token_transform", "_num_labels": 9,
    },
    "gpt2-medium": {"n_special": 0, "predict_special_tokens": True},
    "qwen2-0.5b": {"use_mrope": False, "_attn_implementation_autoset": True},
    "llama-2-7b": {"max_sequence_length": 2048, "unsloth_version": "2024.9", "_flash_attn_2_enabled": True},
    "bamba-9b": {"attn_rotary_emb": 64},
}  # fmt: skip
"""What published files add to what a preset says, and no number depends on."""


@pytest.mark.parametrize("name", REMARKS)
def test_remarks_of_published_files_are_known(name: str) -> None:
    values = PRESETS[name]()
    assert isinstance(values, dict)
    assert spec_from({**values, **REMARKS[name]}) == spec_from(values)


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention", "quantization_config", "pruned_heads"])
def test_what_no_family_runs_is_refused_for_all(key: str) -> None:
    with pytest.raises(QkvError, match=f"^here: {key} is .* for which qkv has no part"):
        spec_from({"model_type": "bert", key: {"a": 1}}, (), "here")


def test_a_fault_of_the_parts_names_the_file_once() -> None:
    values = PRESETS["bert-tiny"]()
    assert isinstance(values, dict)
    with pytest.raises(QkvError, match=r"^here: the dropout of attention lies in \[0, 1\)"):
        spec_from({**values, "attention_probs_dropout_prob": 2.0}, (), "here")
    with pytest.raises(QkvError, match=r"^here: num_attention_heads is 0; "):
        spec_from({**values, "num_attention_heads": 0}, (), "here")


@pytest.mark.parametrize("numbers", [lambda c: 1 / 0, lambda c: 10.0**400, lambda c: float(10**400)])
def test_numbers_that_cannot_be_computed_with_are_a_sentence(
    numbers: Callable[[Config], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkv.zoo.registry.FAMILIES", dict(FAMILIES))
    family("impossible", names="")(numbers)
    with pytest.raises(QkvError, match=r"^here: its numbers make no model \("):
        spec_from({"model_type": "impossible"}, (), "here")


def test_what_a_family_says_stays_short_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(c: Config) -> Model:
        raise QkvError(f"{c.where if 'own' in c else ''} is {c.values['architectures']}")

    monkeypatch.setattr("qkv.zoo.registry.FAMILIES", dict(FAMILIES))
    family("talkative", names="")(read)
    for more in ({}, {"own": True}):
        with pytest.raises(QkvError, match="^here") as raised:
            spec_from({"model_type": "talkative", "architectures": ["x"] * 10**4, **more}, (), "here")
        assert 300 < len(str(raised.value)) < 500


def test_families_and_presets_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkv.zoo.registry.FAMILIES", dict(FAMILIES))
    monkeypatch.setattr("qkv.zoo.registry.PRESETS", dict(PRESETS))

    @family("a-kind", "its-alias", names="m.x a\n = m.y b", prefix="m.")
    def read(c: Config) -> Model:
        raise QkvError("read")

    @preset("a-preset")
    def make() -> dict[str, Any]:
        return {"model_type": "its-alias"}

    for kind in ("a-kind", "its-alias"):
        found = family_of({"model_type": kind})
        assert found.kind == kind and found.spec is read
        assert found.tables(spec_from(bases()["bert"])) == ["m.x a\n = m.y b", "x a\n = y b"]
    with pytest.raises(QkvError, match=r"^config\.json: read$"):
        spec_from(make())


# --- whatever stands in it ---


def bases() -> dict[str, dict[str, Any]]:
    """A published configuration of each kind, with few layers."""
    found = [values for values in (make() for make in PRESETS.values()) if isinstance(values, dict)]
    few = {
        "num_hidden_layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_decoder_layers",
        "encoder_layers",
        "decoder_layers",
    }
    return {
        values["model_type"]: {key: min(value, 2) if key in few else value for key, value in values.items()}
        for values in found
    }


BASES = bases()
EXTRA = (
    "id2label", "num_labels", "layer_types", "rope_parameters", "rope_scaling", "head_dim", "tie_word_embeddings",
    "partial_rotary_factor", "original_max_position_embeddings", "sliding_window", "architectures",
)  # fmt: skip
whole = st.sampled_from([-1, 0, 1, 2, 3, 7, 40, 10**9, 2**31, 2**60, 2**63, 10**400])
broken = st.sampled_from([0.0, -1.0, 1.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")])
words = st.sampled_from(["", "auto", "x", "relu", "full_attention", "\ud800", "1" * 5000]) | st.text(max_size=5)
scalar = st.none() | st.booleans() | whole | broken | words
rope_keys = st.sampled_from(["rope_type", "type", "rope_theta", "factor", "beta_fast", "low_freq_factor",
                             "high_freq_factor", "short_factor", "long_factor", "mscale"])  # fmt: skip
rope_kinds = st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope", "su"])
rope = st.dictionaries(rope_keys, scalar | st.lists(scalar, max_size=3) | rope_kinds, max_size=5)
anything = scalar | st.lists(scalar, max_size=4) | st.dictionaries(words, scalar, max_size=3) | rope


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_value_at_any_key_of_any_family_makes_a_model_or_a_sentence(data: st.DataObject) -> None:
    values = dict(BASES[data.draw(st.sampled_from(sorted(BASES)))])
    for key in data.draw(st.lists(st.sampled_from([*values, *EXTRA]), min_size=1, max_size=3)):
        if key != "model_type":
            values[key] = data.draw(anything)
    try:
        spec = spec_from(values, (), "here")
        with Unfilled():
            model = empty(spec)
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        for table in family_of(values).tables(spec):
            parse(table).links(shapes)
    except QkvError as raised:
        said = str(raised)
        assert 10 < len(said) < 700 and said.isprintable(), said


def test_activations_are_ours() -> None:
    assert all(activation(name) for name in set(ACTIVATIONS.values()))
