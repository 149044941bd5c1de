"""How a model's next-token scores become text."""

from qkv.decode.beam import Beam
from qkv.decode.greedy import Greedy, OneByOne
from qkv.decode.rules import (
    AtLeast,
    Ban,
    ForceFirst,
    ForceLast,
    NoRepeat,
    Past,
    RepetitionPenalty,
    Rule,
    Suppress,
    SuppressFirst,
)
from qkv.decode.sample import Sample
from qkv.decode.search import Hypothesis, Rows, Search, decode
from qkv.decode.stream import Session, stream

__all__ = [
    "AtLeast", "Ban", "Beam", "ForceFirst", "ForceLast", "Greedy", "Hypothesis", "NoRepeat", "OneByOne", "Past",
    "RepetitionPenalty", "Rows", "Rule", "Sample", "Search", "Session", "Suppress", "SuppressFirst", "decode", "stream",
]  # fmt: skip
