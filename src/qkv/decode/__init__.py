"""How a model's next-token scores become text."""

from qkv.decode.beam import Beam
from qkv.decode.greedy import Greedy, OneByOne
from qkv.decode.sample import Sample
from qkv.decode.search import Hypothesis, Rows, Search, decode
from qkv.decode.stream import Session, stream

__all__ = [
    "Beam", "Greedy", "Hypothesis", "OneByOne", "Rows", "Sample", "Search", "Session", "decode", "stream",
]  # fmt: skip
