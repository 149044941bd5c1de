"""Translation before the Transformer: recurrent networks joined by the first attention (Bahdanau 2014)."""

from qkv.models import EncoderDecoder
from qkv.parts import GRU, Additive, Attention, Bidirectional, Block, Branch, Head, Mixer, Stack, Tokens
from qkv.zoo.registry import preset


def search(width: int, hidden: int | None, depth: int, dropout: float) -> EncoderDecoder:
    """A bidirectional GRU reads, a GRU writes and searches the source by an additive score; no positions, no norms.

    As in every model here the branches are residual, and a state searches for its own step, as in Luong 2015; in the
    paper the one before it does, and what is found enters the recurrence.
    """

    def branch(f: Mixer) -> Branch:
        return Branch(f, dropout=dropout)

    attention = Attention(1, head_width=hidden, over="memory", score=Additive())
    return EncoderDecoder(
        width=width,
        source=Tokens(dropout=dropout),
        encoder=Stack(Block(rnn=branch(Bidirectional(GRU(hidden)))), depth=depth),
        decoder=Stack(Block(rnn=branch(GRU(hidden)), cross=branch(attention)), depth=depth),
        head=Head(),
    )


@preset("rnn-search")
def base() -> EncoderDecoder:
    """RNNsearch in the paper's sizes: words 620 wide, states 1000 wide, one layer."""
    return search(620, 1000, 1, dropout=0.0)


@preset("rnn-search-tiny")
def tiny() -> EncoderDecoder:
    """2 + 2 layers 128 wide, to stand beside transformer-tiny on the same data."""
    return search(128, None, 2, dropout=0.3)
