"""What `inspect` counts, against counting by hand and by formula."""

import pytest

from qkv.checkpoints.weights import empty
from qkv.look.inspection import inspect
from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, Head, Stack, Tokens
from qkv.spec import edit
from qkv.zoo import PRESETS, spec_of


def find(node, *path):
    for name in path:
        node = next(child for child in node.children if child.name == name)
    return node


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_every_preset_are_those_of_the_model(name):
    spec = edit(spec_of(name), "**.vocab", 50)
    seen = inspect(spec, 8)
    assert seen.root.parameters == empty(spec).count()

    def total(node):
        return node.times * (node.parameters if not node.children else sum(map(total, node.children)) + own(node))

    def own(node):
        return node.parameters - sum(child.parameters * child.times for child in node.children)

    assert total(seen.root) == seen.root.parameters
    assert all(own(node) >= 0 for node in walk(seen.root))


def walk(node):
    yield node
    for child in node.children:
        yield from walk(child)


def test_one_attention_is_its_formula():
    C, T, V = 24, 10, 7
    block = Block(attn=Branch(Attention(4, bias=True)), ffn=Branch(FeedForward(50, bias=False)))
    seen = inspect(Sequence(C, embed=Tokens(vocab=V), stack=Stack(block, depth=3), head=Head(tied=True)), T)
    layer = find(seen.root, "stack", "0")
    attention, ffn = find(layer, "attn", "f"), find(layer, "ffn", "f")
    assert layer.times == 3
    assert attention.parameters == 4 * C * C + 4 * C
    assert attention.flops == 2 * 4 * T * C * C + 2 * 2 * T * T * C
    assert (ffn.parameters, ffn.flops) == (2 * C * 50, 2 * 2 * T * C * 50)
    assert attention.cache_bytes == 2 * (T + 1) * C * 4  # one slot more than there is room for takes the padding
    assert seen.root.cache_bytes == 3 * attention.cache_bytes
    assert seen.root.flops == 3 * (attention.flops + ffn.flops) + 2 * T * C * V
    assert (attention.shape, find(ffn, "up").shape) == ((T, C), (T, 50))


def test_different_neighbours_stand_apart():
    block = Block(attn=Branch(Attention(4)))
    spec = Sequence(16, embed=Tokens(vocab=5), stack=Stack(block, depth=4))
    seen = inspect(edit(spec, "stack.2.attn.f.heads", 2), 4)
    assert [(node.name, node.times) for node in find(seen.root, "stack").children] == [("0", 2), ("2", 1), ("3", 1)]
    assert "0 … 1" in str(seen)
