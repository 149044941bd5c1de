"""What may stand in a branch."""

from qkv.parts.mixers.attention import Attention
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.mamba import Mamba
from qkv.parts.mixers.mamba2 import Mamba2

__all__ = ["Attention", "Body", "Mamba", "Mamba2", "Mixer"]
