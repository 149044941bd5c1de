"""Where a token stands: added to the embedding (absolute), turned into queries and keys (rotary), or a score's bias."""

from qkv.parts.position.absolute import Learned, OneHot, PositionEmbedding, Sinusoidal
from qkv.parts.position.bias import ALiBi, Relative
from qkv.parts.position.position import Position, Positional, Shared
from qkv.parts.position.rotary import Rotary
from qkv.parts.position.scaling import (
    BandScaling,
    EndpointScaling,
    LinearScaling,
    LongRope,
    NTKScaling,
    Scaling,
    YaRN,
)

__all__ = [
    "ALiBi",
    "BandScaling",
    "EndpointScaling",
    "Learned",
    "LinearScaling",
    "LongRope",
    "NTKScaling",
    "OneHot",
    "Position",
    "PositionEmbedding",
    "Positional",
    "Relative",
    "Rotary",
    "Scaling",
    "Shared",
    "Sinusoidal",
    "YaRN",
]
