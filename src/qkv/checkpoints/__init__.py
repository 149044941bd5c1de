"""Weights on disk, and where they come from."""

from qkv.checkpoints.weights import load_model, save_model

__all__ = ["load_model", "save_model"]
