"""Specs as values: strict load, exact dump, printing, editing, comparing."""

import dataclasses as dc
import json
import math
import subprocess
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkv import masks, models, parts
from qkv.errors import QkvError, SpecError
from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, Head, LayerNorm, RMSNorm, Rotary, Stack, Tokens
from qkv.spec import KINDS, Spec, diff, dump, edit, kinds, load, matches, part, walk
from qkv.zoo import PRESETS, spec_of


def small(depth: int = 3) -> Sequence:
    norm = LayerNorm()
    block = Block(attn=Branch(Attention(4), pre=norm), ffn=Branch(FeedForward(32), pre=norm))
    return Sequence(16, embed=Tokens(vocab=11), stack=Stack(block, depth=depth), head=Head(tied=True))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_and_python(name):
    spec = spec_of(name)
    assert load(json.loads(json.dumps(dump(spec)))) == spec
    names = {**vars(masks), **vars(models), **vars(parts)}
    assert eval(repr(spec), names) == spec
    assert eval(str(spec), names) == spec
    assert max(map(len, str(spec).splitlines())) <= 100


def test_equal_specs_hash_alike_and_order_of_branches_counts():
    a, b = Branch(Attention(4)), Branch(FeedForward(8))
    assert Block(x=a, y=b) == Block(x=a, y=b) and hash(Block(x=a, y=b)) == hash(Block(x=a, y=b))
    assert Block(x=a, y=b) != Block(y=b, x=a)
    assert LayerNorm(eps=1) == LayerNorm(eps=1.0) and LayerNorm() != RMSNorm()


@pytest.mark.parametrize(
    ("data", "path", "words"),
    [
        ({"kind": "atention"}, "spec.kind", "did you mean 'attention'"),
        ({"kind": "attention", "head": 3}, "spec", "did you mean 'heads'"),
        ({"kind": "attention", "heads": "3"}, "spec.heads", "expected a whole number, found '3'"),
        ({"kind": "attention", "heads": True}, "spec.heads", "expected a whole number"),
        ({"kind": "attention"}, "spec", "'heads' is missing"),
        ({"kind": "attention", "heads": 6, "kv_heads": 4}, "spec", "4 key-value heads do not divide 6"),
        ({"kind": "branch", "f": {"kind": "rmsnorm"}}, "spec.f", "'rmsnorm' is no Mixer"),
        ({"kind": "branch", "f": {}}, "spec.f", "a 'kind' is needed"),
        ({"kind": "branch", "f": 3}, "spec.f", "expected a table"),
        ({"kind": "block", "attn": {"f": {"kind": "attention", "heads": 2, "mask": {"kind": "windw"}}}},
         "spec.attn.f.mask.kind", "did you mean 'window'"),
        ({"kind": "stack", "pattern": [], "depth": 2}, "spec", "at least one block"),
        ({"kind": "all", "masks": "causal"}, "spec.masks", "expected a list"),
    ],
)  # fmt: skip
def test_bad_data_names_the_path_and_the_fault(data, path, words):
    with pytest.raises(SpecError) as fault:
        load(data)
    assert fault.value.path == path
    assert words in str(fault.value) and "\n" not in str(fault.value)


def test_a_wrong_value_in_python_is_refused_as_well():
    with pytest.raises(SpecError, match=r"Attention.heads: expected a whole number"):
        Attention("8")
    with pytest.raises(TypeError):
        Attention(8, 2)


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("**.attn.f", "stack.0.attn.f", True),
        ("**.attn.f", "attn.f", True),
        ("stack.*.attn.f", "stack.0.attn.f", True),
        ("stack.*.f", "stack.0.attn.f", False),
        ("**", "a.b.c", True),
        ("a.**.c", "a.c", True),
        ("a.*.c", "a.c", False),
        ("a", "ab", False),
    ],
)
def test_globs(pattern, path, hit):
    assert matches(pattern, path) is hit


def test_edit_everywhere_keeps_the_pattern_and_one_layer_unrolls_it():
    spec = small()
    everywhere = edit(spec, "**.attn.f", lambda a: Attention(a.heads, position=Rotary()))
    assert everywhere.stack.pattern == Block(
        attn=Branch(Attention(4, position=Rotary()), pre=LayerNorm()), ffn=spec.stack.blocks[0].branches["ffn"]
    )
    one = edit(spec, "stack.1.attn.f.heads", 2)
    assert [layer.branches["attn"].f.heads for layer in one.stack.layers] == [4, 2, 4]
    assert edit(one, "stack.1.attn.f.heads", 4).stack == spec.stack
    assert edit(spec, "stack.depth", 5).stack.layers == [spec.stack.blocks[0]] * 5


def test_edit_takes_plain_data_and_refuses_what_does_not_fit():
    spec = edit(small(), "**.pre", {"kind": "rmsnorm", "eps": 1e-3})
    assert spec.stack.blocks[0].branches["ffn"].pre == RMSNorm(eps=1e-3)
    with pytest.raises(SpecError, match=r"no path of the spec matches 'stak.depth'.*did you mean 'stack.depth'"):
        edit(small(), "stak.depth", 3)
    with pytest.raises(SpecError, match="expected a whole number"):
        edit(small(), "**.heads", 2.5)


def test_diff_tells_the_smallest_paths():
    before = small()
    after = edit(edit(before, "stack.1.attn.f.heads", 2), "head.tied", False)
    assert [str(change) for change in diff(before, after)] == [
        "stack.1.attn.f.heads: 4 → 2",
        "head.tied: True → False",
    ]
    assert [change.path for change in diff(before, edit(before, "**.attn.f", FeedForward(3)))] == [
        f"stack.{n}.attn.f" for n in range(3)
    ]
    assert diff(before, small()) == []
    one, other = Branch(FeedForward(3)), Branch(FeedForward(4))
    assert [one.path for one in diff({"b": Block(x=one, y=other)}, {"b": Block(y=other, x=one)})] == ["b"]


def test_walk_gives_paths_that_edit_finds():
    spec = small()
    for path, value in walk(spec):
        assert edit(spec, path, lambda same: same) == spec, path
        assert value is not spec


def test_a_kind_is_registered_once():
    with pytest.raises(QkvError, match="'attention' is taken by"):

        @part("attention")
        class Other(Spec):
            pass

    assert KINDS["attention"] is Attention


def test_kinds_lists_what_fits_a_slot():
    assert {"layernorm", "rmsnorm", "batchnorm", "dyt"} <= set(kinds(parts.Norm))
    assert "attention" not in kinds(parts.Norm)


KEYS = st.sampled_from(["kind", "f", "heads", "masks"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)))
def test_no_data_makes_anything_but_a_spec_or_a_sentence(data):
    try:
        assert isinstance(load(data), Spec)
    except SpecError as fault:
        assert "\n" not in str(fault)


def test_the_package_and_its_specs_import_no_torch():
    code = "import sys, qkv, qkv.spec, qkv.errors, qkv.recipes, qkv.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- parts of others ---


@pytest.fixture
def registry():
    before = dict(KINDS)
    yield KINDS
    KINDS.clear()
    KINDS.update(before)


def test_annotations_may_be_strings_and_defaults_may_be_made(registry):
    source = """
from __future__ import annotations
import dataclasses as dc
from typing import ClassVar
from qkv.parts import Norm, RMSNorm
from qkv.spec import part

@part("later")
class Later(Norm):
    sizes: tuple[int, ...] = dc.field(default_factory=lambda: (1, 2))
    over_batch: ClassVar[bool] = False

@part("more")
class More(RMSNorm):
    extra: int
"""
    module = types.ModuleType("later")
    sys.modules["later"] = module
    try:
        exec(source, vars(module))
        made = module.Later()
        assert made.sizes == (1, 2) and dump(made) == {"kind": "later"} and load({"kind": "later"}) == made
        assert repr(module.Later((3,))) == "Later(sizes=(3,))"
        assert repr(module.More(extra=3)) == "More(extra=3)" and module.More(0.5, extra=3).eps == 0.5
        with pytest.raises(SpecError, match="the key 'extra' is missing"):
            load({"kind": "more"})
    finally:
        del sys.modules["later"]


def test_what_has_no_kind_of_its_own_is_not_written_as_another():
    class Mine(Attention):
        pass

    with pytest.raises(QkvError, match="Mine has no kind of its own"):
        dump(Branch(Mine(4)))


def test_entries_may_be_named_self_and_come_as_one_table():
    a, b = Branch(Attention(4)), Branch(FeedForward(8))
    assert list(Block(self=a, x=b).branches) == ["self", "x"]
    assert dc.replace(Block(x=a, y=b), branches={"x": a}) == Block(x=a) == Block(branches={"x": a})


def test_numbers_that_are_none_are_refused_and_infinity_is_written():
    with pytest.raises(SpecError, match="expected a number, found nan"):
        RMSNorm(eps=math.nan)
    limited = parts.Mamba2(4, step_limit=(0.1, math.inf))
    assert eval(repr(limited), vars(parts)) == limited == load(json.loads(json.dumps(dump(limited))))


def test_what_differs_without_a_path_differs_as_a_whole():
    block = small().stack.pattern
    once, twice = Stack(block, depth=2), Stack((block, block), depth=2)
    assert [change.path for change in diff({"stack": once}, {"stack": twice})] == ["stack"] and not diff(once, once)
