"""Stacks: which layers there are, in which order, what they share, and recomputing them."""

import pytest
import torch

from qkv.context import Context
from qkv.errors import QkvError
from qkv.masks import Causal, Window
from qkv.models import Sequence
from qkv.parts import (
    ALiBi,
    Attention,
    Block,
    Branch,
    FeedForward,
    Head,
    LayerNorm,
    Learned,
    Relative,
    Shared,
    Stack,
    Tokens,
)
from qkv.spec import edit
from tests.parts.helpers import seeded, wild

C, T = 8, 5
A = Block(attn=Branch(Attention(2), pre=LayerNorm()), ffn=Branch(FeedForward(7)))
B = Block(mix=Branch(FeedForward(5, act="gelu")))


def tokens() -> torch.Tensor:
    return torch.randn(2, T, C, dtype=torch.float64, generator=seeded())


def context() -> Context:
    return Context(torch.arange(T)[None], Causal())


def by_hand(stack, order: list[int]) -> torch.Tensor:
    """The named layers one after the other, each in a stack of its own."""
    x = tokens()
    for n in order:
        one = Stack(stack.spec.layers[n], depth=1).build(C).double()
        one.load_state_dict({f"0.{name}": value for name, value in stack._modules[str(n)].state_dict().items()})
        x = one(x, context())
    return x


@pytest.mark.parametrize(
    ("spec", "order"),
    [
        (Stack(A, depth=3), [0, 1, 2]),
        (Stack((A, B), depth=5), [0, 1, 2, 3, 4]),
        (Stack((A, B, B), depth=2), [0, 1]),
        (Stack(A, depth=4, use=(0, 0, 1, 1)), [0, 0, 1, 1]),
        (Stack((A, B), depth=4, use=(1, 0, 1, 0)), [1, 0, 1, 0]),
    ],
    ids=["one block", "a pattern", "a cut pattern", "shared layers", "shared layers of a pattern"],
)
def test_layers_run_in_their_order(spec, order):
    stack = wild(spec.build(C))
    torch.testing.assert_close(stack(tokens(), context()), by_hand(stack, order), rtol=1e-10, atol=1e-10)
    kinds = ["attn" in dict(stack.layer(n).branches()) for n in range(spec.depth)]
    assert kinds == [spec.blocks[n % len(spec.blocks)] == A for n in order]


def test_shared_layers_are_counted_once_and_learn_from_each_use():
    count = sum(p.numel() for p in A.build(C).parameters())
    tied = wild(Stack(A, depth=4, use=(0, 0, 1, 1)).build(C))
    assert sum(p.numel() for p in tied.parameters()) == 2 * count
    free = Stack(A, depth=4).build(C).double()
    free.load_state_dict({f"{n}.{k}": v for n in range(4) for k, v in tied.layer(n).state_dict().items()})
    for stack in (tied, free):
        stack(tokens(), context()).square().sum().backward()
    for name, parameter in tied.named_parameters():
        n, rest = name.split(".", 1)
        twice = sum(free.get_parameter(f"{m}.{rest}").grad for m in (2 * int(n), 2 * int(n) + 1))
        torch.testing.assert_close(parameter.grad, twice, rtol=1e-9, atol=1e-9)


def test_names_in_a_state_dict():
    embed, stack = Tokens(vocab=11, position=Learned(9)), Stack((A, B), depth=2)
    spec = Sequence(C, embed=embed, stack=stack, norm=LayerNorm(), head=Head(bias=True))
    assert set(spec.build().state_dict()) == {
        "embed.tokens.weight", "embed.position.weight",
        "stack.0.attn.pre.weight", "stack.0.attn.pre.bias",
        "stack.0.attn.f.q.weight", "stack.0.attn.f.k.weight", "stack.0.attn.f.v.weight", "stack.0.attn.f.o.weight",
        "stack.0.ffn.f.up.weight", "stack.0.ffn.f.up.bias", "stack.0.ffn.f.down.weight", "stack.0.ffn.f.down.bias",
        "stack.1.mix.f.up.weight", "stack.1.mix.f.up.bias", "stack.1.mix.f.down.weight", "stack.1.mix.f.down.bias",
        "norm.weight", "norm.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_layers_that_look_alike_prepare_once():
    def looks(*attentions: Attention, **shared) -> int:
        blocks = tuple(Block(attn=Branch(f)) for f in attentions)
        return len(Stack(blocks, depth=6, shared=shared).build(C).prepares)

    assert looks(Attention(2)) == 1
    assert looks(Attention(2, mask=Window(3)), Attention(2)) == 2
    assert looks(Attention(2, position=ALiBi())) == 1  # nothing learned: the same for all
    assert looks(Attention(2, position=Relative())) == 6  # a table for each layer
    assert looks(Attention(2, position=Shared("r")), r=Relative()) == 1
    assert looks(Attention(2), Attention(4)) == 2


def test_a_table_of_its_own_in_each_layer_is_read_by_that_layer():
    stack = wild(Stack(Block(attn=Branch(Attention(2, position=Relative(buckets=4, far=8)))), depth=3).build(C), 1.0)
    torch.testing.assert_close(stack(tokens(), context()), by_hand(stack, [0, 1, 2]), rtol=1e-10, atol=1e-10)


def test_recomputing_runs_each_layer_twice_and_gives_the_same_gradients():
    attn = Branch(Attention(2, dropout=0.2), dropout=0.3, survival=0.7)
    block = Block(attn=attn, ffn=Branch(FeedForward(7), dropout=0.3))
    stack, runs = wild(Stack((block, B), depth=4, use=(0, 1, 0, 1)).build(C)), []
    stack._modules["0"].register_forward_pre_hook(lambda *_: runs.append(1))
    found = []
    for stack.recompute in (False, True):
        torch.manual_seed(3)
        stack.zero_grad()
        runs.clear()
        stack(tokens(), context()).square().sum().backward()
        found.append(([p.grad.clone() for p in stack.parameters()], len(runs)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert [runs for _, runs in found] == [2, 4]
    runs.clear()
    stack.eval()(tokens(), context()).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize(
    "options",
    [(0, None), (2, (0, 2)), (2, (1, 1)), (2, (0,)), (2, (-1, 0)), (2, ())],
    ids=str,
)
def test_layers_that_cannot_be_are_refused(options):
    with pytest.raises(QkvError):
        Stack(A, depth=options[0], use=options[1])


def test_editing_one_of_several_shared_layers_keeps_the_sharing():
    spec = edit(Stack(A, depth=4, use=(0, 0, 1, 1)), "1.attn.f.heads", 4)
    assert [block.branches["attn"].f.heads for block in spec.layers] == [2, 4]
    assert spec.use == (0, 0, 1, 1) and spec.depth == 4
