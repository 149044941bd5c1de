"""What holds weights: each file shows the specs that one reads, and below them the modules that they build."""

from qkv.parts.block import Block, Branch, Gate, LayerScale, Parallel
from qkv.parts.embed import Embedding, Tokens
from qkv.parts.feedforward import FeedForward, Gated
from qkv.parts.head import Head
from qkv.parts.linear import Linear
from qkv.parts.mixers import Attention, Body, Mixer
from qkv.parts.norm import BatchNorm, DyT, LayerNorm, Norm, RMSNorm
from qkv.parts.position import (
    ALiBi,
    Learned,
    OneHot,
    Position,
    Positional,
    PositionEmbedding,
    Relative,
    Rotary,
    Shared,
    Sinusoidal,
)
from qkv.parts.score import Additive, ScaledDot, Score
from qkv.parts.stack import Stack

__all__ = [
    "ALiBi",
    "Additive",
    "Attention",
    "BatchNorm",
    "Block",
    "Body",
    "Branch",
    "DyT",
    "Embedding",
    "FeedForward",
    "Gate",
    "Gated",
    "Head",
    "LayerNorm",
    "LayerScale",
    "Learned",
    "Linear",
    "Mixer",
    "Norm",
    "OneHot",
    "Parallel",
    "Position",
    "PositionEmbedding",
    "Positional",
    "RMSNorm",
    "Relative",
    "Rotary",
    "ScaledDot",
    "Score",
    "Shared",
    "Sinusoidal",
    "Stack",
    "Tokens",
]
