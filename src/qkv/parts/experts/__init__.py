"""Sparse mixtures of experts, in place of a feed-forward, and how a token finds the experts that read it."""

from qkv.parts.experts.experts import Experts, PlainExperts, Sparse
from qkv.parts.experts.routing import BiasedTopK, NoisyTopK, Routed, Router, TopK

__all__ = ["BiasedTopK", "Experts", "NoisyTopK", "PlainExperts", "Routed", "Router", "Sparse", "TopK"]
