"""What is learned: how a batch is corrupted, and the loss; one file each."""

from qkv.objectives.auxiliary import Auxiliary, Balance, Importance, Load, RouterZ, SequenceBalance
from qkv.objectives.masked import MaskedTokens
from qkv.objectives.next_token import NextToken
from qkv.objectives.objective import Example, Objective, Vocabulary
from qkv.objectives.recall import Recall
from qkv.objectives.seq2seq import Seq2Seq

# fmt: off
__all__ = [
    "Auxiliary", "Balance", "Example", "Importance", "Load", "MaskedTokens", "NextToken", "Objective", "Recall",
    "RouterZ", "Seq2Seq", "SequenceBalance", "Vocabulary",
]
# fmt: on
