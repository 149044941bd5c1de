"""The Transformer (Vaswani 2017, Attention Is All You Need), and smaller ones of the same form."""

from qkv.models import EncoderDecoder
from qkv.parts import Attention, Block, Branch, FeedForward, Head, LayerNorm, Sinusoidal, Stack, Tokens
from qkv.zoo.registry import preset


def transformer(width: int, heads: int, hidden: int, depth: int, dropout: float) -> EncoderDecoder:
    """Post-norm throughout, embeddings × √C, sinusoidal positions, one table for source, target and output."""
    norm = LayerNorm()

    def branch(f: Attention | FeedForward) -> Branch:
        return Branch(f, post=norm, dropout=dropout)

    attention = Attention(heads, bias=True)
    cross = Attention(heads, over="memory", bias=True)
    ffn = FeedForward(hidden)
    return EncoderDecoder(
        width=width,
        source=Tokens(position=Sinusoidal(), scaled=True, dropout=dropout),
        encoder=Stack(Block(attn=branch(attention), ffn=branch(ffn)), depth=depth),
        decoder=Stack(Block(attn=branch(attention), cross=branch(cross), ffn=branch(ffn)), depth=depth),
        head=Head(tied=True),
    )


@preset("transformer-base")
def base() -> EncoderDecoder:
    """The base model of the paper: 6 + 6 layers, 65 M parameters with its 37,000 word pieces."""
    return transformer(512, 8, 2048, 6, dropout=0.1)


@preset("transformer-big")
def big() -> EncoderDecoder:
    """The big model of the paper: 213 M parameters."""
    return transformer(1024, 16, 4096, 6, dropout=0.3)


@preset("transformer-small")
def small() -> EncoderDecoder:
    """3 + 3 layers 256 wide, the size with which spelling to sound was published (g2p-seq2seq)."""
    return transformer(256, 4, 1024, 3, dropout=0.1)


@preset("transformer-tiny")
def tiny() -> EncoderDecoder:
    """4 + 4 layers 128 wide, for Multi30k (Wu 2021, Good for Misconceived Reasons)."""
    return transformer(128, 4, 256, 4, dropout=0.3)
