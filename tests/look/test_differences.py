"""Two models are compared by what they are, not by how much of it is spelt out."""

import pytest

from qkv.look import differences
from qkv.models import EncoderDecoder, Sequence
from qkv.parts import Attention, Block, Branch, Stack, Tokens


def decoder(**fields: int) -> Sequence:
    return Sequence(24, embed=Tokens(9), stack=Stack(Block(attn=Branch(Attention(4, **fields))), depth=3))


def pair(**fields: int) -> EncoderDecoder:
    block = Block(attn=Branch(Attention(4, **fields)), cross=Branch(Attention(4, over="memory", **fields)))
    return EncoderDecoder(24, source=Tokens(9), encoder=decoder(**fields).stack, decoder=Stack(block, depth=2))


@pytest.mark.parametrize("make", [decoder, pair])
def test_what_follows_from_the_rest_may_be_left_out(make: type[Sequence]) -> None:
    for fields in ({"head_width": 6}, {"kv_heads": 4}, {"head_width": 6, "kv_heads": 4}):
        assert differences(make(), make(**fields)) == differences(make(**fields), make()) == []


def test_what_does_not_follow_is_told_layer_by_layer() -> None:
    for fields in ({"head_width": 8}, {"kv_heads": 2}):
        [(name, value)] = fields.items()
        told = [str(change) for change in differences(decoder(head_width=6, kv_heads=4), decoder(**fields))]
        assert told == [f"stack.{n}.attn.f.{name}: None → {value}" for n in range(3)]
