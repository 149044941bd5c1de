"""ALBERT: BERT with a narrow table of tokens and with layers that share their weights (Lan 2019)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Pool, Transform
from qkv.zoo.config import DEEPEST, Config
from qkv.zoo.encoder import encoder, head, norm, vocabulary
from qkv.zoo.registry import family, preset

NAMES = """
    albert.embeddings.word_embeddings               embed.tokens
    albert.embeddings.position_embeddings           embed.position
    albert.embeddings.token_type_embeddings         embed.segments
    albert.embeddings.LayerNorm                     embed.norm
    albert.encoder.embedding_hidden_mapping_in      embed.project
    albert.encoder.albert_layer_groups.{i}.albert_layers.0.attention.{query,key,value,dense}  stack.{i}.attn.f.{q,k,v,o}
    albert.encoder.albert_layer_groups.{i}.albert_layers.0.attention.LayerNorm                stack.{i}.attn.post
    albert.encoder.albert_layer_groups.{i}.albert_layers.0.{ffn,ffn_output}                   stack.{i}.ffn.f.{up,down}
    albert.encoder.albert_layer_groups.{i}.albert_layers.0.full_layer_layer_norm              stack.{i}.ffn.post
    predictions.{dense,LayerNorm}                   head.transform.{dense,norm}
    albert.pooler                                   head.pool.transform.dense
    classifier                                      head.out
    qa_outputs                                      head.ends
    + albert.pooler.*
    + sop_classifier.*
    ~ albert.embeddings.position_ids
"""


def names(spec: Sequence) -> str:
    return NAMES + vocabulary(spec, "predictions")


@family("albert", names=names, prefix="albert.")
def albert(c: Config) -> Sequence:
    """ALBERT, both versions."""
    for key, value in {"inner_group_num": 1, "down_scale_factor": 1, "gap_size": 0, "num_memory_blocks": 0}.items():
        c.only(key, value)
    c.only("net_structure_type", 0)
    c.only("layers_to_keep", [])
    depth, groups = c.integer("num_hidden_layers", most=DEEPEST), c.depth("num_hidden_groups", 1)
    inner, dropout = c.integer("embedding_size"), c.number("classifier_dropout_prob", c.number("hidden_dropout_prob"))
    transform, pool = Transform(c.act("hidden_act"), norm=norm(c), width=inner), Pool(transform=Transform("tanh"))
    use = tuple(int(n / (depth / groups)) for n in range(depth))
    return encoder(c, head(c, transform, pool, dropout), inner=inner, use=use)


@preset("albert-base-v2")
def base() -> dict[str, Any]:
    """12 layers 768 wide that are one, 11 M parameters, version 2 (Lan 2019)."""
    return {
        "model_type": "albert", "architectures": ["AlbertForMaskedLM"], "vocab_size": 30000, "embedding_size": 128,
        "hidden_size": 768, "num_hidden_layers": 12, "num_hidden_groups": 1, "inner_group_num": 1,
        "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu_new", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.1, "max_position_embeddings": 512,
        "type_vocab_size": 2, "layer_norm_eps": 1e-12, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
    }  # fmt: skip
