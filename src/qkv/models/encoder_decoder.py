"""An encoder, and a decoder that reads what it made."""

from typing import NotRequired, TypedDict

from torch import Tensor

from qkv.context import Tap
from qkv.masks import Causal, Full, Mask
from qkv.models.model import Model, Module, Wiring, run
from qkv.parts.embed import TiedTokens, TokenEmbedding, Tokens
from qkv.parts.head import Head, Output
from qkv.parts.norm import Norm
from qkv.parts.stack import Stack
from qkv.spec import part, positive


@part("encoder-decoder")
class EncoderDecoder(Model):
    """p(y | x) = Π p(y_t | y_<t, encode(x)) (Vaswani 2017).

    The decoder's cross-attention reads the memory named `memory`. `target=None` shares the source's embedding,
    `TiedTokens` only its table.
    """

    width: int
    source: Tokens
    encoder: Stack
    decoder: Stack
    target: Tokens | TiedTokens | None = None
    mask: Mask = Causal()
    encoder_norm: Norm | None = None
    decoder_norm: Norm | None = None
    head: Output | None = Head()

    def check(self) -> None:
        positive(self, "width")

    def build(self) -> "EncoderDecoderModel":
        return EncoderDecoderModel(self)


class Memory(TypedDict):
    """What an encoder leaves for a decoder, to be passed on as `**memory`."""

    memory: Tensor
    """B S C, rows packed left."""
    memory_lengths: NotRequired[Tensor]
    """B, where rows differ."""


class EncoderDecoderModel(Module):
    """`memory = model.encode(source)`; then `model(target, **memory)` or `model.new_state(batch, room, **memory)`."""

    spec: EncoderDecoder

    def __init__(self, spec: EncoderDecoder) -> None:
        super().__init__()
        self.spec = spec
        self.source = spec.source.build(spec.width)
        self.target = spec.target.build(spec.width, self.source) if spec.target else None
        self.encoder, self.decoder = spec.encoder.build(spec.width), spec.decoder.build(spec.width)
        self.encoder_norm = spec.encoder_norm.build(spec.width) if spec.encoder_norm else None
        self.decoder_norm = spec.decoder_norm.build(spec.width) if spec.decoder_norm else None
        self.head = spec.head.build(spec.width, self.embed.table) if spec.head else None

    @property
    def embed(self) -> TokenEmbedding:
        """The decoder's embedding."""
        return self.source if self.target is None else self.target

    @property
    def wiring(self) -> Wiring:
        return self.wired(self.embed, self.decoder, self.decoder_norm, self.spec.mask, "decoder")

    @property
    def reading(self) -> Wiring:
        """The pass that the ids of a source take."""
        return self.wired(self.source, self.encoder, self.encoder_norm, Full(), "encoder")

    def encode(
        self,
        ids: Tensor,
        *,
        valid: Tensor | None = None,
        lengths: Tensor | None = None,
        tap: Tap | None = None,
        **given: Tensor,
    ) -> Memory:
        """Source ids B S → what the decoder reads: `memory` B S C, packed left, and `memory_lengths` B if ragged."""
        memory = run(ids, self.reading, given, valid=valid, lengths=lengths, tap=tap, unpack=False)
        lengths = lengths if valid is None else valid.sum(1)
        return Memory(memory=memory) if lengths is None else Memory(memory=memory, memory_lengths=lengths)
