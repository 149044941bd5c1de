"""GPT: a decoder with pre-norm blocks (Radford 2019)."""

from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, Head, LayerNorm, Learned, Stack, Tokens
from qkv.zoo.registry import preset


def gpt(width: int, heads: int, depth: int, room: int, dropout: float, bias: bool = True) -> Sequence:
    norm = LayerNorm()
    attention, ffn = Attention(heads, bias=bias), FeedForward(4 * width, act="gelu", bias=bias)
    block = Block(attn=Branch(attention, pre=norm, dropout=dropout), ffn=Branch(ffn, pre=norm, dropout=dropout))
    embed = Tokens(position=Learned(room), dropout=dropout)
    return Sequence(width=width, embed=embed, stack=Stack(block, depth=depth), norm=norm, head=Head(tied=True))


@preset("gpt-tiny")
def tiny() -> Sequence:
    """4 layers 128 wide over 64 characters: nanoGPT's recipe for a CPU."""
    return gpt(128, 4, 4, room=64, dropout=0.0, bias=False)


@preset("gpt-small")
def small() -> Sequence:
    """6 layers 384 wide over 256 characters: nanoGPT's recipe for tiny-shakespeare."""
    return gpt(384, 6, 6, room=256, dropout=0.2, bias=False)
