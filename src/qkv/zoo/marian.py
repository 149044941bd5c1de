"""Marian: the Transformer of 2017, its sines before its cosines (Junczys-Dowmunt 2018, Tiedemann 2020)."""

from qkv.models import EncoderDecoder
from qkv.parts import Head, Sinusoidal, Tokens
from qkv.zoo.bart import LAYERS, SHARED, encoder_decoder
from qkv.zoo.config import Config
from qkv.zoo.registry import family

APART = """
    model.encoder.embed_tokens                                      source.tokens
    model.decoder.embed_tokens                                      target.tokens
    = lm_head                                                       target.tokens
    lm_head.weight                                                  head.weight
"""
DERIVED = """
    ~ model.encoder.embed_positions.weight
    ~ model.decoder.embed_positions.weight
"""


def names(spec: EncoderDecoder) -> str:
    return LAYERS + (SHARED if spec.target is None else APART) + DERIVED


@family("marian", names=names, prefix="model.")
def marian(c: Config) -> EncoderDecoder:
    """OPUS-MT: one table for source, target and output, or a vocabulary for each side."""
    c.ignore("max_position_embeddings", "extra_pos_embeddings")
    c.only("static_position_embeddings", True)
    c.only("normalize_embedding", False)
    shared, vocab = c.flag("share_encoder_decoder_embeddings", True), c.integer("vocab_size")

    def tokens(size: int) -> Tokens:
        position, scaled = Sinusoidal(interleaved=False), c.flag("scale_embedding", False)
        return Tokens(size, position=position, scaled=scaled, dropout=c.number("dropout", 0.1))

    if shared:
        c.only("decoder_vocab_size", vocab)
        c.only("tie_word_embeddings", True)
    target = None if shared else tokens(c.integer("decoder_vocab_size", vocab))
    c.only("architectures", ["MarianMTModel"], ["MarianModel"])
    bare = c.values.get("architectures") == ["MarianModel"]
    head = None if bare else Head(tied=shared or c.tied("lm_head.weight"), bias=True)
    return encoder_decoder(c, tokens(vocab), target, head)
