"""A memory of matrices, its slots, and the published systems that fill them."""

from qkv.parts.mixers.memory.decay import Decay, PerChannel, PerHead, PerToken, StepSize, Tied
from qkv.parts.mixers.memory.feature import Feature, Pointwise, Positive, Softmax, Unit
from qkv.parts.mixers.memory.memory import Memory
from qkv.parts.mixers.memory.rule import Add, Delta, Exponential, Rule, Write, Writing
from qkv.parts.mixers.memory.systems import (
    GLA,
    HGRN2,
    KDA,
    MLSTM,
    DeltaNet,
    GatedDeltaNet,
    GatedRetention,
    LinearAttention,
    Retention,
    System,
)

__all__ = [
    "GLA",
    "HGRN2",
    "KDA",
    "MLSTM",
    "Add",
    "Decay",
    "Delta",
    "DeltaNet",
    "Exponential",
    "Feature",
    "GatedDeltaNet",
    "GatedRetention",
    "LinearAttention",
    "Memory",
    "PerChannel",
    "PerHead",
    "PerToken",
    "Pointwise",
    "Positive",
    "Retention",
    "Rule",
    "Softmax",
    "StepSize",
    "System",
    "Tied",
    "Unit",
    "Write",
    "Writing",
]
