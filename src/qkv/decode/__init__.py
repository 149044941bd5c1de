"""How a model's next-token scores become text."""

from qkv.decode.beam import Beam
from qkv.decode.engine import Batcher, Request
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
from qkv.decode.search import Hypothesis, Move, Rows, Search, Steps, decode
from qkv.decode.speculative import Draft, Lookup, Proposer, speculate
from qkv.decode.stream import Session, stream

__all__ = [
    "AtLeast", "Ban", "Batcher", "Beam", "Draft", "ForceFirst", "ForceLast", "Greedy", "Hypothesis", "Lookup", "Move",
    "NoRepeat", "OneByOne", "Past", "Proposer", "RepetitionPenalty", "Request", "Rows", "Rule", "Sample", "Search",
    "Session", "Steps", "Suppress", "SuppressFirst", "decode", "speculate", "stream",
]  # fmt: skip
