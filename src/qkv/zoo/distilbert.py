"""DistilBERT: every other layer of BERT, without segments, taught by the whole (Sanh 2019)."""

from typing import Any

from qkv.masks import Full
from qkv.models import Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    FeedForward,
    LayerNorm,
    Learned,
    Output,
    Pool,
    Span,
    Stack,
    Tokens,
    Transform,
)  # fmt: skip
from qkv.zoo import encoder
from qkv.zoo.config import Config
from qkv.zoo.registry import family, preset

NAMES = """
    distilbert.embeddings.word_embeddings                               embed.tokens
    distilbert.embeddings.position_embeddings                           embed.position
    distilbert.embeddings.LayerNorm                                     embed.norm
    distilbert.transformer.layer.{i}.attention.{q,k,v,out}_lin          stack.{i}.attn.f.{q,k,v,o}
    distilbert.transformer.layer.{i}.sa_layer_norm                      stack.{i}.attn.post
    distilbert.transformer.layer.{i}.ffn.{lin1,lin2}                    stack.{i}.ffn.f.{up,down}
    distilbert.transformer.layer.{i}.output_layer_norm                  stack.{i}.ffn.post
    vocab_transform                                                     head.transform.dense
    vocab_layer_norm                                                    head.transform.norm
    vocab_projector                                                     head
    = vocab_projector.weight                                            embed.tokens.weight
    pre_classifier                                                      head.pool.transform.dense
    classifier                                                          head.out
    qa_outputs                                                          head.ends
    ~ distilbert.embeddings.position_ids
"""

NORM = LayerNorm(1e-12)


@family("distilbert", names=NAMES, prefix="distilbert.")
def distilbert(c: Config) -> Sequence:
    """DistilBERT and DistilmBERT."""
    c.ignore("sinusoidal_pos_embds", "tie_weights_")  # how positions start: the file holds their table either way
    attention = Attention(c.integer("n_heads"), bias=True, dropout=c.number("attention_dropout", 0.1))
    ffn, dropout = FeedForward(c.integer("hidden_dim"), act=c.act("activation", "gelu")), c.number("dropout", 0.1)
    block = Block(attn=Branch(attention, post=NORM), ffn=Branch(ffn, post=NORM, dropout=dropout))
    position = Learned(c.integer("max_position_embeddings", 512))
    return Sequence(
        width=c.integer("dim"),
        embed=Tokens(c.integer("vocab_size"), position=position, norm=NORM, dropout=dropout),
        stack=Stack(block, depth=c.depth("n_layers")),
        mask=Full(),
        head=head(c, dropout),
    )


def head(c: Config, dropout: float) -> Output | None:
    """As BERT's, with a dropout for each."""
    of_texts, of_spans = c.number("seq_classif_dropout", 0.2), c.number("qa_dropout", 0.1)
    transform, pool = Transform(c.act("activation", "gelu"), norm=NORM), Pool(transform=Transform("relu"))
    top = encoder.head(c, transform, pool, of_texts if c.task == "SequenceClassification" else dropout)
    return Span(dropout=of_spans) if isinstance(top, Span) else top


@preset("distilbert-base")
def base() -> dict[str, Any]:
    """6 layers 768 wide, 67 M parameters (Sanh 2019)."""
    return {
        "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 30522, "dim": 768,
        "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "activation": "gelu", "dropout": 0.1,
        "attention_dropout": 0.1, "seq_classif_dropout": 0.2, "qa_dropout": 0.1, "max_position_embeddings": 512,
        "sinusoidal_pos_embds": False, "pad_token_id": 0,
    }  # fmt: skip
