"""Embeddings, written out."""

import copy

import pytest
import torch

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts import (
    Block,
    Branch,
    FeedForward,
    Head,
    LayerNorm,
    Learned,
    OneHot,
    Sinusoidal,
    Stack,
    TiedTokens,
    Tokens,
)
from tests.parts.helpers import seeded, wild

C, V, T = 6, 11, 5
IDS = torch.randint(V, (2, T), generator=seeded())
SEGMENTS = torch.tensor([[0, 0, 1, 1, 2], [2, 1, 1, 0, 0]])


def context(order: torch.Tensor | None = None, **given: torch.Tensor) -> Context:
    return Context(torch.arange(T)[None], order=order, given=given)


def test_it_is_a_row_of_the_table():
    module = wild(Tokens(vocab=V).build(C))
    torch.testing.assert_close(module(IDS, context()), module.table[IDS])
    assert module.table.shape == (V, C) and list(module.state_dict()) == ["tokens.weight"]


def test_everything_at_once_in_its_order():
    spec = Tokens(vocab=V, position=Learned(9), segments=3, norm=LayerNorm(), scaled=True)
    module = wild(spec.build(C))
    x = module.table[IDS] * C**0.5 + module.position.weight[:T] + module.segments.weight[SEGMENTS]
    torch.testing.assert_close(module(IDS, context(segments=SEGMENTS)), module.norm(x))
    x = module.table[IDS] * C**0.5 + module.position.weight[:T] + module.segments.weight[0]
    torch.testing.assert_close(module(IDS, context()), module.norm(x))  # no segments given: all are the first


def test_segments_follow_the_packed_rows():
    module = wild(Tokens(vocab=V, segments=3).build(C))
    order = torch.tensor([[2, 3, 4, 0, 1], [0, 1, 2, 3, 4]])
    expected = module.table[IDS] + module.segments.weight[SEGMENTS.gather(1, order)]
    torch.testing.assert_close(module(IDS, context(order, segments=SEGMENTS)), expected)


def test_a_narrow_table_is_projected():
    module = wild(Tokens(vocab=V, width=3, position=Learned(9), norm=LayerNorm()).build(C))
    assert module.table.shape == (V, 3) and module.position.weight.shape == (9, 3)
    inner = module.norm(module.table[IDS] + module.position.weight[:T])
    torch.testing.assert_close(module(IDS, context()), inner @ module.project.weight.T + module.project.bias)


def test_tied_tokens_have_all_but_the_table():
    source = wild(Tokens(vocab=V, position=Learned(9)).build(C))
    spec = TiedTokens(position=Learned(7, offset=1), segments=2, norm=LayerNorm(), scaled=True)
    module = wild(spec.build(C, source))
    x = source.table[IDS] * C**0.5 + module.position.weight[1 : T + 1] + module.segments.weight[0]
    torch.testing.assert_close(module(IDS, context()), module.norm(x))
    assert module.table is source.table and module.room == 6
    assert list(module.state_dict()) == ["position.weight", "segments.weight", "norm.weight", "norm.bias"]


def test_tied_tokens_follow_a_table_that_is_replaced_copied_or_trained():
    model = torch.nn.ModuleDict({"source": Tokens(vocab=V).build(C)})
    model["target"] = TiedTokens().build(C, model["source"])
    twin = copy.deepcopy(model)
    assert twin["target"].table is twin["source"].table is not model["source"].table
    twin.load_state_dict({"source.tokens.weight": torch.ones(V, C)}, assign=True)
    assert twin["target"](IDS, context()).eq(1).all()
    (model["source"](IDS, context()).sum() + model["target"](IDS, context()).sum()).backward()
    assert model["source"].table.grad.sum() == 2 * IDS.numel() * C and len(list(model.parameters())) == 1


def test_tied_tokens_need_a_source_as_wide_as_they_are():
    for source in (None, Tokens(vocab=V, width=3).build(C)):
        with pytest.raises(QkvError, match="tied tokens share the table of a source that is 6 wide"):
            TiedTokens().build(C, source)


def test_a_narrow_table_cannot_be_the_heads_matrix():
    from qkv.models import Sequence

    stack = Stack(Block(ffn=Branch(FeedForward(4))), depth=1)
    with pytest.raises(QkvError):
        Sequence(C, embed=Tokens(vocab=V, width=3), stack=stack, head=Head(tied=True)).build()


def test_dropout_acts_in_training_only():
    module = wild(Tokens(vocab=V, dropout=0.5).build(C))
    torch.manual_seed(0)
    out = module(IDS, context())
    assert ((out == 0) | torch.isclose(out, 2 * module.table[IDS])).all() and 10 < int((out == 0).sum()) < 50
    torch.testing.assert_close(module.eval()(IDS, context()), module.table[IDS])


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_dropout_that_cannot_be_is_refused(p):
    with pytest.raises(QkvError):
        Tokens(vocab=V, dropout=p)


@pytest.mark.parametrize(("position", "room"), [(Learned(9), 9), (OneHot(7), 7), (Sinusoidal(), None), (None, None)])
def test_room(position, room):
    assert Tokens(vocab=V, position=position).build(C).room == room


def test_a_vocabulary_must_be_known():
    with pytest.raises(QkvError, match="vocabulary's size is not set: give vocab"):
        Tokens().build(C)


def test_fresh_tables_have_the_size_that_keeps_scores_near_1():
    torch.manual_seed(0)
    module = Tokens(vocab=1000, segments=2, width=50).build(200)
    assert abs(module.table.std().item() * 50**0.5 - 1) < 0.02
