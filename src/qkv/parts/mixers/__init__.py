"""What may stand in a branch."""

from qkv.parts.mixers.attention import Attention
from qkv.parts.mixers.body import Body, Mixer

__all__ = ["Attention", "Body", "Mixer"]
