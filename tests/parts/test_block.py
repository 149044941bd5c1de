"""Residual branches, written out."""

import pytest
import torch
from torch import Tensor

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts import Block, Branch, DyT, FeedForward, Gated, LayerNorm, LayerScale, Parallel, RMSNorm
from qkv.spec import dump, load
from tests.parts.helpers import seeded, wild

C, T = 6, 3
CONTEXT = Context(torch.arange(T)[None])
F, G = FeedForward(7, act="tanh"), Gated(5)


def tokens(rows: int = 2) -> Tensor:
    return torch.randn(rows, T, C, dtype=torch.float64, generator=seeded())


@pytest.mark.parametrize(
    "norms",
    [
        {},
        {"pre": LayerNorm()},
        {"post": LayerNorm()},
        {"pre": RMSNorm(), "out": DyT()},
        {"pre": RMSNorm(), "out": DyT(), "post": LayerNorm(), "gate": LayerScale()},
    ],
    ids=str,
)
def test_a_branch_is_its_equation(norms):
    branch, x = wild(Branch(F, **norms).build(C)), tokens()
    at = {name: getattr(branch, name) or torch.nn.Identity() for name in ("pre", "out", "gate", "post")}
    expected = at["post"](x + at["gate"](at["out"](branch.f(at["pre"](x)))))
    torch.testing.assert_close(branch(x, CONTEXT), expected, rtol=1e-12, atol=1e-12)
    assert {name.split(".")[0] for name in branch.state_dict()} == {"f", *norms}


def test_a_layer_scale_starts_small_and_is_learned_per_feature():
    branch, x = Branch(F, gate=LayerScale(start=0.25)).build(C).double(), tokens()
    torch.testing.assert_close(branch(x, CONTEXT), x + 0.25 * branch.f(x))
    assert LayerScale().build(C).weight.tolist() == pytest.approx([1e-4] * C)


@pytest.mark.parametrize("survival", [0.3, 0.8])
def test_rows_survive_as_often_as_they_say_and_the_mean_stays(survival):
    branch, rows = wild(Branch(F, survival=survival).build(C)), 20000
    x = tokens(1)
    torch.manual_seed(0)
    delta, out = branch.f(x), branch(x.expand(rows, T, C), CONTEXT) - x
    survived = out.abs().amax((1, 2)) > 0
    torch.testing.assert_close(out[survived], (delta / survival).expand(int(survived.sum()), T, C))
    assert abs(float(survived.double().mean()) - survival) < 5 * (survival * (1 - survival) / rows) ** 0.5
    torch.testing.assert_close(branch.eval()(x, CONTEXT), x + delta)


def test_dropout_acts_on_what_is_added_and_in_training_only():
    branch, x = wild(Branch(F, out=LayerNorm(), gate=LayerScale(), dropout=0.25).build(C)), tokens(500)
    torch.manual_seed(0)
    delta, out = branch.out(branch.f(x)) * branch.gate.weight, branch(x, CONTEXT) - x
    kept = out.abs() > 1e-12
    torch.testing.assert_close(out[kept], (delta / 0.75)[kept])
    assert abs(float(kept.double().mean()) - 0.75) < 0.03
    torch.testing.assert_close(branch.eval()(x, CONTEXT), x + delta)


@pytest.mark.parametrize(
    "options", [{"dropout": 1.0}, {"dropout": -0.1}, {"survival": 0.0}, {"survival": 1.1}], ids=str
)
def test_chances_are_chances(options):
    (name,) = options
    with pytest.raises(QkvError, match=rf"the {name} of (a )?branch lies in [\[(]0, 1[\])]"):
        Branch(F, **options)


def test_branches_follow_each_other_in_their_order():
    a, b = Branch(F, pre=LayerNorm()), Branch(G, post=RMSNorm())
    block, x = wild(Block(one=a, two=b).build(C)), tokens()
    torch.testing.assert_close(block(x, CONTEXT, {}), block.two(block.one(x, CONTEXT), CONTEXT))
    turned = Block(two=b, one=a).build(C).double()
    turned.load_state_dict(block.state_dict())
    torch.testing.assert_close(turned(x, CONTEXT, {}), block.one(block.two(x, CONTEXT), CONTEXT))


@pytest.mark.parametrize("pre", [None, LayerNorm()], ids=str)
def test_parallel_branches_read_the_same_and_add_up(pre):
    block, x = wild(Parallel(pre=pre, one=Branch(F, pre=RMSNorm()), two=Branch(G)).build(C)), tokens()
    read = x if pre is None else block.pre(x)
    expected = x + block.one.f(block.one.pre(read)) + block.two.f(read)
    torch.testing.assert_close(block(x, CONTEXT, {}), expected)


def test_a_parallel_branch_has_no_post():
    with pytest.raises(QkvError, match="no stream of its own"):
        Parallel(one=Branch(F, post=LayerNorm()))
    with pytest.raises(QkvError, match="needs a branch"):
        Block()


@pytest.mark.parametrize(
    "name",
    ["forward", "train", "pre", "a b", "3", "spec", "kind", "training", "branches", "bodies", "new_cells"],
)
def test_a_name_either_works_or_is_refused(name):
    with pytest.raises(QkvError, match="cannot name a branch"):
        Block(**{name: Branch(F)})


@pytest.mark.parametrize("name", ["attn", "out", "f", "class", "注意"])
def test_other_names_are_free(name):
    spec = Block(**{name: Branch(F)})
    assert load(dump(spec)) == spec
    assert list(dict(spec.build(C).branches())) == [name]
