"""Wiring only: how parts become a model."""

from qkv.models.encoder_decoder import EncoderDecoder, EncoderDecoderModel, Memory
from qkv.models.model import Model, Module
from qkv.models.sequence import Sequence, SequenceModel

__all__ = ["EncoderDecoder", "EncoderDecoderModel", "Memory", "Model", "Module", "Sequence", "SequenceModel"]
