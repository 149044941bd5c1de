"""BERT: an encoder with post-norm blocks, token, position and segment embeddings (Devlin 2018)."""

from typing import Any

from qkv.masks import Full
from qkv.models import Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    FeedForward,
    Head,
    LayerNorm,
    Learned,
    Output,
    Pool,
    Span,
    Stack,
    Tagger,
    Tokens,
    Transform,
)  # fmt: skip
from qkv.zoo.config import Config
from qkv.zoo.registry import family, preset

NAMES = """
    bert.embeddings.word_embeddings                             embed.tokens
    bert.embeddings.position_embeddings                         embed.position
    bert.embeddings.token_type_embeddings                       embed.segments
    bert.embeddings.LayerNorm                                   embed.norm
    bert.encoder.layer.{i}.attention.self.{query,key,value}     stack.{i}.attn.f.{q,k,v}
    bert.encoder.layer.{i}.attention.output.dense               stack.{i}.attn.f.o
    bert.encoder.layer.{i}.attention.output.LayerNorm           stack.{i}.attn.post
    bert.encoder.layer.{i}.{intermediate,output}.dense          stack.{i}.ffn.f.{up,down}
    bert.encoder.layer.{i}.output.LayerNorm                     stack.{i}.ffn.post
    cls.predictions.transform.{dense,LayerNorm}                 head.transform.{dense,norm}
    cls.predictions.bias                                        head.bias
    = cls.predictions.decoder.bias                              head.bias
    = cls.predictions.decoder.weight                            embed.tokens.weight
    bert.pooler.dense                                           head.pool.transform.dense
    classifier                                                  head.out
    qa_outputs                                                  head.ends
    + bert.pooler.*
    + cls.seq_relationship.*
    ~ bert.embeddings.position_ids
"""


@family("bert", names=NAMES, prefix="bert.")
def bert(c: Config) -> Sequence:
    """BERT and MiniLM."""
    c.only("position_embedding_type", "absolute")
    norm, act = LayerNorm(c.number("layer_norm_eps", 1e-12)), c.act("hidden_act")
    dropout = c.number("hidden_dropout_prob")
    attention = Attention(c.integer("num_attention_heads"), bias=True, dropout=c.number("attention_probs_dropout_prob"))
    ffn = FeedForward(c.integer("intermediate_size"), act=act)
    block = Block(attn=Branch(attention, post=norm, dropout=dropout), ffn=Branch(ffn, post=norm, dropout=dropout))
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(
            c.integer("vocab_size"),
            position=Learned(c.integer("max_position_embeddings")),
            segments=c.integer("type_vocab_size"),
            norm=norm,
            dropout=dropout,
        ),
        stack=Stack(block, depth=c.depth("num_hidden_layers")),
        mask=Full(),
        head=head(c, Transform(act, norm=norm), Pool(transform=Transform("tanh"))),
    )


def head(c: Config, transform: Transform, pool: Pool) -> Output | None:
    """What an encoder's class puts on top; `pool` makes the vector of a text for classes."""
    tied = c.flag("tie_word_embeddings", True)
    last = c.number("classifier_dropout", c.number("hidden_dropout_prob"))
    if c.task in ("MaskedLM", "PreTraining"):
        return Head(tied=tied, bias=True, transform=transform)
    if c.task == "SequenceClassification":
        return Classifier(c.labels(), pool=pool, dropout=last)
    if c.task == "TokenClassification":
        return Tagger(c.labels(), dropout=last)
    return Span() if c.task == "QuestionAnswering" else None


def sized(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 30522, "hidden_size": width,
        "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12,
    }  # fmt: skip


@preset("bert-tiny")
def tiny() -> dict[str, Any]:
    """2 layers 128 wide, 4.4 M parameters (Turc 2019)."""
    return sized(128, 2, 2)


@preset("bert-mini")
def mini() -> dict[str, Any]:
    """4 layers 256 wide, 11 M parameters (Turc 2019)."""
    return sized(256, 4, 4)


@preset("bert-base")
def base() -> dict[str, Any]:
    """12 layers 768 wide, 110 M parameters (Devlin 2018)."""
    return sized(768, 12, 12)
