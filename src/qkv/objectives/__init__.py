"""What is learned: how a batch is corrupted, and the loss; one file each."""

from qkv.objectives.masked import MaskedTokens
from qkv.objectives.next_token import NextToken
from qkv.objectives.objective import Example, Objective, Vocabulary
from qkv.objectives.seq2seq import Seq2Seq

__all__ = ["Example", "MaskedTokens", "NextToken", "Objective", "Seq2Seq", "Vocabulary"]
