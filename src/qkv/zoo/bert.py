"""BERT: an encoder with post-norm blocks, token, position and segment embeddings (Devlin 2018)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Pool, Transform
from qkv.zoo.config import Config
from qkv.zoo.encoder import BODY, encoder, head, last_dropout, norm, vocabulary
from qkv.zoo.registry import family, preset

HEADS = """
    cls.predictions.transform.{dense,LayerNorm}                 head.transform.{dense,norm}
    bert.pooler.dense                                           head.pool.transform.dense
    classifier                                                  head.out
    qa_outputs                                                  head.ends
    + bert.pooler.*
    + cls.seq_relationship.*
"""

EARLIEST = """
    bert.embeddings.LayerNorm.{gamma,beta}                          embed.norm.{weight,bias}
    bert.encoder.layer.{i}.attention.output.LayerNorm.{gamma,beta}  stack.{i}.attn.post.{weight,bias}
    bert.encoder.layer.{i}.output.LayerNorm.{gamma,beta}            stack.{i}.ffn.post.{weight,bias}
    cls.predictions.transform.LayerNorm.{gamma,beta}                head.transform.norm.{weight,bias}
"""
"""How the first files name the norms; they are written as the later ones do."""


UNREAD = "pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"
"""Of a pooler that the first multilingual and Chinese files speak of, and have no weights for."""


def names(spec: Sequence) -> str:
    return BODY + HEADS + vocabulary(spec, "cls.predictions") + EARLIEST


@family("bert", names=names, prefix="bert.")
def bert(c: Config) -> Sequence:
    """BERT and MiniLM."""
    c.ignore("directionality", *UNREAD.split())
    transform, pool = Transform(c.act("hidden_act"), norm=norm(c)), Pool(transform=Transform("tanh"))
    return encoder(c, head(c, transform, pool, last_dropout(c)))


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
