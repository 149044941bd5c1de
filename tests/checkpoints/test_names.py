"""The language of name tables, against definitions written out with loops."""

import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qkv.checkpoints.names import (
    HIGHEST,
    Link,
    Plan,
    apply,
    filled,
    parse,
    plan,
    read,
    shown,
    write,
    written_out,
)  # fmt: skip
from qkv.errors import QkvError
from qkv.zoo.registry import without_prefix


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: numbers(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}


def links(text: str, shapes: dict[str, tuple[int, ...]]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(link.sources, link.targets) for link in parse(text).links(shapes)]


# --- rows ---


def test_a_row_names_a_module_or_one_tensor() -> None:
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "b": (4,), "ab.weight": (1,), "a.weight.more": (1,)}
    assert links("x.y a\nz b", shapes) == [
        (("x.y.weight",), ("a.weight",)),
        (("x.y.bias",), ("a.bias",)),
        (("z",), ("b",)),
    ]


def test_a_dot_is_a_dot() -> None:
    assert links("x.y a.b", {"a.b": (1,), "axb": (1,)}) == [(("x.y",), ("a.b",))]


def test_an_index_stands_on_both_sides() -> None:
    shapes = {f"s.{i}.{j}.w.weight": (1,) for i in (0, 11) for j in (3,)} | {"s.x.0.w.weight": (1,)}
    assert links("l.{j}.of.{i} s.{i}.{j}.w", shapes) == [
        (("l.3.of.0.weight",), ("s.0.3.w.weight",)),
        (("l.3.of.11.weight",), ("s.11.3.w.weight",)),
    ]


def test_lists_on_both_sides_are_paired() -> None:
    assert list(written_out("a.{x,y}.m.{1,2}", "b.{p,q}.{v,w}")) == [
        ("a.x.m.1", ("b.p.v",)),
        ("a.x.m.2", ("b.p.w",)),
        ("a.y.m.1", ("b.q.v",)),
        ("a.y.m.2", ("b.q.w",)),
    ]
    with pytest.raises(ValueError, match="zip"):
        list(written_out("a.{x,y}", "b.{p,q,r}"))


def test_a_pair_may_have_an_empty_side() -> None:
    assert list(written_out("a.{x,y}.{weight,bias}", "b.{p,q}{,_b}")) == [
        ("a.x.weight", ("b.p",)),
        ("a.x.bias", ("b.p_b",)),
        ("a.y.weight", ("b.q",)),
        ("a.y.bias", ("b.q_b",)),
    ]


def test_one_more_list_on_the_right_is_a_split() -> None:
    assert list(written_out("a.{x,y}", "{p,q}.{u,v,w}")) == [
        ("a.x", ("p.u", "p.v", "p.w")),
        ("a.y", ("q.u", "q.v", "q.w")),
    ]
    shapes = {f"b.{name}.{leaf}": (1,) for leaf in ("weight", "bias") for name in "qkv"}
    assert links("a b.{q,k,v}", shapes) == [
        (("a.weight",), ("b.q.weight", "b.k.weight", "b.v.weight")),
        (("a.bias",), ("b.q.bias", "b.k.bias", "b.v.bias")),
    ]
    assert links("a b.{q,k,v}", {"b.q": (1,), "b.k": (1,)}) == []  # a model that lacks one has no such split


def test_an_index_on_the_left_only_stacks() -> None:
    (link,) = parse("e.{e}.{i}.w s.{i}.w").links({"s.7.w": (3, 2, 5)})
    assert link == Link(("e.0.7.w", "e.1.7.w", "e.2.7.w"), ("s.7.w",), (), stacked=True, alias=False)


def test_a_table_that_would_stack_without_end_is_refused() -> None:
    with pytest.raises(QkvError, match=r"^w would stack 65,537 tensors, and no model has so many$"):
        parse("e.{e} w").links({"w": (HIGHEST + 1, 1)})


def test_a_table_has_comments_marks_and_operations() -> None:
    table = parse("""
        # a remark
        x   a   transpose squeeze:1   # why
        = y b
        ~ *.pos
        + *.vision.*
    """)
    assert [(row.source, row.targets, row.operations, row.alias) for row in table.rows] == [
        ("x", ("a",), ("transpose", "squeeze:1"), False),
        ("y", ("b",), (), True),
    ]
    assert [pattern.fullmatch("a.b.pos") is not None for pattern in table.derived] == [True]
    assert table.derived[0].fullmatch("a.pos.x") is None and table.derived[0].fullmatch("aXpos") is None
    assert table.kept[0].fullmatch("m.vision.w") is not None
    assert parse("x a") is parse("x a")


def test_templates_are_filled_and_prefixes_taken_off() -> None:
    assert filled("a.{i}.{j}", {"i": "3"}) == "a.3.{j}"
    text = "\n  m.x  m.a\n  = m.y b\n~ m.z\n  + m.v.*\n  other m.q\n"
    assert without_prefix(text, "m.") == "\n  x  m.a\n  = y b\n~ z\n  + v.*\n  other m.q\n"


# --- operations ---


def interleaved(x: Tensor, heads: int) -> Tensor:
    """Row 2p + s of a head, s its member of pair p, becomes row p + s K/2."""
    rows, K = torch.empty_like(x), len(x) // heads
    for h in range(heads):
        for p in range(K // 2):
            for s in range(2):
                rows[h * K + p + s * (K // 2)] = x[h * K + 2 * p + s]
    return rows


def by_group(x: Tensor, groups: int, queries: int) -> Tensor:
    """Of each group r query heads, a key, a value → first all queries, then all keys, then all values."""
    K = len(x) // (groups * (queries + 2))
    q: list[Tensor] = []
    k: list[Tensor] = []
    v: list[Tensor] = []
    rows: Iterator[Tensor] = iter(x)
    for _ in range(groups):
        q += [next(rows) for _ in range(queries * K)]
        k += [next(rows) for _ in range(K)]
        v += [next(rows) for _ in range(K)]
    return torch.stack(q + k + v)


sizes = st.integers(1, 5)


@given(heads=sizes, pairs=sizes, columns=sizes)
def test_rope_halves_each_head(heads: int, pairs: int, columns: int) -> None:
    for x in (numbers(heads * 2 * pairs, columns), numbers(heads * 2 * pairs)):
        y = apply([f"rope:{heads}"], x)
        assert torch.equal(y, interleaved(x, heads))
        assert torch.equal(apply([f"rope:{heads}"], y, back=True), x)


@given(groups=sizes, queries=sizes, K=sizes, columns=sizes)
def test_ungroup_gathers_queries_keys_and_values(groups: int, queries: int, K: int, columns: int) -> None:
    rows = groups * (queries + 2) * K
    for x in (numbers(rows, columns), numbers(rows)):
        y = apply([f"ungroup:{groups}:{queries}"], x)
        assert torch.equal(y, by_group(x, groups, queries))
        assert torch.equal(apply([f"ungroup:{groups}:{queries}"], y, back=True), x)


def test_transpose_turns_matrices_only() -> None:
    x = numbers(3, 5)
    assert torch.equal(apply(["transpose"], x), torch.tensor([[float(x[i, j]) for i in range(3)] for j in range(5)]))
    assert torch.equal(apply(["transpose"], apply(["transpose"], x), back=True), x)
    assert torch.equal(apply(["transpose"], x[0]), x[0])


def test_squeeze_drops_a_dimension_of_one() -> None:
    x = numbers(3, 1, 5)
    assert torch.equal(apply(["squeeze:1"], x), x[:, 0])
    assert torch.equal(apply(["squeeze:1"], x[:, 0], back=True), x)


def test_minus_and_log_minus_undo_themselves() -> None:
    x = numbers(4, 3)
    assert torch.equal(apply(["minus:1"], x), torch.tensor([[float(v) - 1 for v in row] for row in x]))
    assert torch.allclose(apply(["minus:1"], apply(["minus:1"], x), back=True), x, atol=1e-6)
    A = -x.abs() - 0.1
    assert torch.allclose(-apply(["log-minus"], A).exp(), A) and torch.equal(apply(["log-minus"], A), (-A).log())
    assert torch.allclose(apply(["log-minus"], apply(["log-minus"], A), back=True), A)


def test_operations_run_in_order_and_back_the_other_way_round() -> None:
    x, both = numbers(4, 1, 3), ["squeeze:1", "transpose"]
    assert torch.equal(apply(both, x), x[:, 0].t())
    assert torch.equal(apply(both, x[:, 0].t(), back=True), x)


# --- planning ---


def planned(text: str, shapes: dict[str, tuple[int, ...]], keys: list[str]) -> Plan:
    return plan(parse(text), shapes, keys)


def test_a_plan_says_what_becomes_of_every_tensor() -> None:
    text = "x a\n= y a\n= lost a\n~ *.ids\n+ extra.*\n+ *.ids"
    made = planned(text, {"a.weight": (2,)}, ["e.ids", "x.weight", "extra.w", "y.weight"])
    assert [link.sources for link in made.links] == [("x.weight",)]
    assert [link.sources for link in made.aliases] == [("y.weight",)]
    assert made.derived == ["e.ids"] and made.kept == ["extra.w"]


def test_the_first_row_that_the_file_has_fills_a_parameter() -> None:
    text, shapes = "new a\nold a", {"a": (2,)}
    assert [link.sources for link in planned(text, shapes, ["old"]).links] == [("old",)]
    assert [link.sources for link in planned(text, shapes, ["new"]).links] == [("new",)]
    with pytest.raises(QkvError, match="^nothing reads old$"):
        planned(text, shapes, ["new", "old"])


def test_an_alias_that_fills_its_own_parameter_is_none() -> None:
    """A file's head that the table reads is not compared with the embedding as well."""
    made = planned("e emb\nh head\n= h emb", {"emb": (2,), "head": (2,)}, ["e", "h"])
    assert made.aliases == [] and len(made.links) == 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["x.weight", "z"], "nothing reads z; it lacks x.bias"),
        (["x.weight", "x.bias", "z"], "nothing reads z"),
        (["x.weight"], "it lacks x.bias"),
        ([], "it lacks x.weight, x.bias"),
        (["x.weight", "x.bias", *"abcdef"], "nothing reads a, b, c, d and 2 more"),
        (["x.weight", "x.bias", "a\nb"], "nothing reads 'a\\nb'"),
    ],
)
def test_what_does_not_come_out_even_is_listed(keys: list[str], said: str) -> None:
    with pytest.raises(QkvError, match=f"^{re.escape(said)}$"):
        planned("x a", {"a.weight": (2,), "a.bias": (2,)}, keys)


def test_a_parameter_that_no_row_names_is_lacking() -> None:
    with pytest.raises(QkvError, match="^it lacks … → b$"):
        planned("x a", {"a": (2,), "b": (2,)}, ["x"])


def test_long_lists_of_long_names_stay_one_line() -> None:
    assert shown(["a", "b"]) == "a, b" and shown([]) == ""
    assert shown(list("abcdefg")) == "a, b, c, d and 3 more"
    assert len(shown(["x" * 10**6] * 10**4)) < 300


# --- reading ---


def read_all(text: str, shapes: dict[str, tuple[int, ...]], file: dict[str, Tensor]) -> dict[str, Tensor]:
    return read(plan(parse(text), shapes, list(file)), shapes, file.__getitem__)


def test_what_is_used_as_it_is_stays_what_it_was() -> None:
    file = {"x": numbers(3, 2), "y": numbers(6, 2, seed=1)}
    tensors = read_all("x a\ny {p,q}", {"a": (3, 2), "p": (2, 2), "q": (4, 2)}, file)
    assert tensors["a"] is file["x"]
    assert tensors["p"].data_ptr() == file["y"].data_ptr()  # a split is a view
    assert torch.equal(tensors["q"], file["y"][2:])


def test_stacks_are_in_the_order_of_their_numbers() -> None:
    file = {f"e.{n}": numbers(2, 3, seed=n) for n in reversed(range(12))}
    stacked = read_all("e.{e} w transpose", {"w": (12, 3, 2)}, file)["w"]
    assert all(torch.equal(stacked[n], file[f"e.{n}"].t()) for n in range(12))


ERRORS = {
    "by the configuration a has the shape (2, 3), x makes it (3, 2)": ("x a", {"a": (2, 3)}, {"x": (3, 2)}),
    "by the configuration p has the shape (2, 3), x makes it (2, 2)": (
        "x {p,q}", {"p": (2, 3), "q": (2, 3)}, {"x": (4, 2)}),
    "x cannot become p: its shape is another": ("x {p,q}", {"p": (2,), "q": (3,)}, {"x": (4,)}),
    "x cannot become a: its shape is another": ("x a rope:3", {"a": (8,)}, {"x": (8,)}),
    "e.0 cannot become w: its shape is another": ("e.{e} w", {"w": (2, 3)}, {"e.0": (3,), "e.1": (4,)}),
    "y differs from a, with which the configuration ties it": ("x a\n= y a", {"a": (2,)}, {"x": (2,), "y": (2,)}),
}  # fmt: skip


@pytest.mark.parametrize("said", ERRORS)
def test_shapes_and_ties_that_do_not_fit_are_named(said: str) -> None:
    text, shapes, file = ERRORS[said]
    with pytest.raises(QkvError, match=f"^{re.escape(said)}$"):
        read_all(text, shapes, model(file))


def test_a_scalar_is_no_list_of_rows() -> None:
    with pytest.raises(QkvError, match="its shape is another"):
        read_all("x {p,q}", {"p": (1,), "q": (1,)}, {"x": torch.tensor(1.0)})


def test_a_tie_is_compared_after_its_operations_and_by_shape() -> None:
    x = numbers(2, 3)
    assert torch.equal(read_all("x a\n= y a transpose", {"a": (2, 3)}, {"x": x, "y": x.t()})["a"], x)
    with pytest.raises(QkvError, match="ties it"):
        read_all("x a\n= y a", {"a": (2, 3)}, {"x": x, "y": x.view(1, 2, 3)})


def test_a_sentence_of_the_file_itself_is_passed_on() -> None:
    def damaged(key: str) -> Tensor:
        raise QkvError(f"{key} is damaged")

    with pytest.raises(QkvError, match="^x is damaged$"):
        read(planned("x a", {"a": (1,)}, ["x"]), {"a": (1,)}, damaged)


# --- both ways ---

TABLE = """
    emb                 embed
    l.{i}.{q,k}         s.{i}.{q,k}             rope:3
    l.{i}.qkv           s.{i}.g.{q,k,v}         ungroup:2:3
    l.{i}.c             s.{i}.c                 squeeze:1
    l.{i}.{up,down}     s.{i}.f.{0,1}           transpose
    l.{i}.e.{e}.w       s.{i}.experts           transpose
    old                 norm
    new                 norm
    = head              embed
    + vision.*
"""


@given(depth=st.integers(1, 3), K=st.integers(1, 3), C=st.integers(1, 5), E=st.integers(1, 4))
@settings(max_examples=40)
def test_writing_and_reading_are_inverse_bit_for_bit(depth: int, K: int, C: int, E: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (7, C), "norm.weight": (C,), "norm.bias": (C,)}
    for i in range(depth):
        shapes |= {f"s.{i}.{name}.weight": (3 * 2 * K, C) for name in "qk"}
        shapes |= {f"s.{i}.g.{name}.bias": (rows * 2 * K,) for name, rows in (("q", 3), ("k", 1), ("v", 1))}
        shapes |= {f"s.{i}.c.weight": (C, 4), f"s.{i}.f.0.weight": (C, 3), f"s.{i}.f.1.weight": (3, C)}
        shapes |= {f"s.{i}.experts": (E, C, 2)}
    tensors, table = model(shapes), parse(TABLE)
    file = dict(write(table, tensors))
    assert {name.partition(".")[0] for name in file} == {"emb", "l", "old"}
    assert file["l.0.c.weight"].shape == (C, 1, 4) and file["l.0.e.0.w"].shape == (2, C)
    assert file["l.0.qkv.bias"].shape == (10 * K,) and f"l.0.e.{E}.w" not in file
    again = read_all(TABLE, shapes, file | {"head.weight": tensors["embed.weight"], "vision.x": numbers(1)})
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert all(torch.equal(x, dict(write(table, again))[name]) for name, x in file.items())


def test_what_the_form_has_no_place_for_is_named() -> None:
    with pytest.raises(QkvError, match="^this form has no place for b, c$"):
        list(write(parse("x a"), model({"a": (1,), "b": (1,), "c": (1,)})))


def test_tensors_are_written_without_their_gradients() -> None:
    (pair,) = write(parse("x a"), {"a": torch.nn.Parameter(numbers(2))})
    assert pair[0] == "x" and not pair[1].requires_grad
