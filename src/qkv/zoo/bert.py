"""BERT: an encoder with post-norm blocks, token, position and segment embeddings (Devlin 2018)."""

from qkv.masks import Full
from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, Head, LayerNorm, Learned, Stack, Tokens
from qkv.zoo.registry import preset


def bert(width: int, heads: int, depth: int, room: int = 512, dropout: float = 0.1) -> Sequence:
    norm = LayerNorm(1e-12)
    attention = Attention(heads, bias=True, dropout=dropout)
    ffn = FeedForward(4 * width, act="gelu")
    block = Block(attn=Branch(attention, post=norm, dropout=dropout), ffn=Branch(ffn, post=norm, dropout=dropout))
    embed = Tokens(position=Learned(room), segments=2, norm=norm, dropout=dropout)
    stack = Stack(block, depth=depth)
    return Sequence(width=width, embed=embed, stack=stack, mask=Full(), head=Head(tied=True, bias=True))


@preset("bert-tiny")
def tiny() -> Sequence:
    """2 layers 128 wide (Turc 2019)."""
    return bert(128, 2, 2)


@preset("bert-mini")
def mini() -> Sequence:
    """4 layers 256 wide (Turc 2019)."""
    return bert(256, 4, 4)
