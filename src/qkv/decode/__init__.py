"""How a model's next-token scores become text."""

from qkv.decode.beam import Beam
from qkv.decode.greedy import Greedy
from qkv.decode.sample import Sample
from qkv.decode.search import Hypothesis, Rows, Search, decode

__all__ = ["Beam", "Greedy", "Hypothesis", "Rows", "Sample", "Search", "decode"]
