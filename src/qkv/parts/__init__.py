"""What holds weights: each file shows the specs that one reads, and below them the modules that they build."""

from qkv.parts.block import Block, Branch, Gate, LayerScale, Parallel
from qkv.parts.embed import Embedding, TiedTokens, Tokens
from qkv.parts.experts import Experts, Router, TopK
from qkv.parts.feedforward import FeedForward, Gated
from qkv.parts.head import Classifier, Head, Output, Pool, Span, Tagger, Transform, Vector
from qkv.parts.linear import Linear
from qkv.parts.mixers import Attention, Body, Mamba, Mamba2, Mixer
from qkv.parts.norm import BatchNorm, DyT, LayerNorm, Norm, RMSNorm
from qkv.parts.position import (
    ALiBi,
    BandScaling,
    Learned,
    LinearScaling,
    LongRope,
    NTKScaling,
    OneHot,
    Position,
    Positional,
    PositionEmbedding,
    Relative,
    Rotary,
    Scaling,
    Shared,
    Sinusoidal,
    YaRN,
)
from qkv.parts.score import Additive, ScaledDot, Score
from qkv.parts.stack import Stack

__all__ = [
    "ALiBi",
    "Additive",
    "Attention",
    "BandScaling",
    "BatchNorm",
    "Block",
    "Body",
    "Branch",
    "Classifier",
    "DyT",
    "Embedding",
    "Experts",
    "FeedForward",
    "Gate",
    "Gated",
    "Head",
    "LayerNorm",
    "LayerScale",
    "Learned",
    "Linear",
    "LinearScaling",
    "LongRope",
    "Mamba",
    "Mamba2",
    "Mixer",
    "NTKScaling",
    "Norm",
    "OneHot",
    "Output",
    "Parallel",
    "Pool",
    "Position",
    "PositionEmbedding",
    "Positional",
    "RMSNorm",
    "Relative",
    "Rotary",
    "Router",
    "ScaledDot",
    "Scaling",
    "Score",
    "Shared",
    "Sinusoidal",
    "Span",
    "Stack",
    "Tagger",
    "TiedTokens",
    "Tokens",
    "TopK",
    "Transform",
    "Vector",
    "YaRN",
]
