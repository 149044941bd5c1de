"""Falcon: attention and feed-forward side by side, one or few key-value heads (Almazrouei 2023)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, LayerNorm, Parallel, Stack, Tokens
from qkv.zoo.config import Config
from qkv.zoo.decoder import head
from qkv.zoo.gpt2 import labelled
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import rotary

NAMES = """
    transformer.word_embeddings                         embed.tokens
    transformer.h.{i}.self_attention.query_key_value    stack.{i}.attn.f.{q,k,v}    ungroup:GROUPS:QUERIES
    transformer.h.{i}.self_attention.dense              stack.{i}.attn.f.o
    transformer.h.{i}.mlp.dense_h_to_4h                 stack.{i}.ffn.f.up
    transformer.h.{i}.mlp.dense_4h_to_h                 stack.{i}.ffn.f.down
    transformer.ln_f                                    norm
    lm_head                                             head
    = lm_head.weight                                    embed.tokens.weight
    qa_outputs                                          head.ends
    ~ *.rotary_emb.inv_freq
"""
ONE = """
    transformer.h.{i}.input_layernorm                   stack.{i}.pre
"""
TWO = """
    transformer.h.{i}.{ln_attn,ln_mlp}                  stack.{i}.{attn,ffn}.pre
"""
SERIAL = """
    transformer.h.{i}.input_layernorm                   stack.{i}.attn.pre
    transformer.h.{i}.post_attention_layernorm          stack.{i}.ffn.pre
"""


def names(spec: Sequence) -> str:
    """Each key-value head stands behind its queries in the file; the norms are called by how many there are."""
    block = spec.stack.blocks[0]
    attention = block.branches["attn"].f
    assert isinstance(attention, Attention)
    groups = attention.kv_heads or attention.heads
    norms = SERIAL if not isinstance(block, Parallel) else ONE if block.pre else TWO
    table = NAMES.replace("GROUPS", str(groups)).replace("QUERIES", str(attention.heads // groups))
    return labelled(table + norms)(spec)


@family("falcon", names=names, prefix="transformer.")
def falcon(c: Config) -> Sequence:
    """Falcon with rotary positions.

    Those with ALiBi (falcon-rw) learned slope · position in the 8 bits of bf16: it rises in steps, by 0, 2 or 4 where
    ALiBi rises by 0.84, and is no function of the distance. No part does that.
    """
    c.only("alibi", False)
    c.only("apply_residual_connection_post_layernorm", False)
    c.ignore("ff_factor", "max_position_embeddings")
    width, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    newer, groups = c.flag("new_decoder_architecture", False), c.optional("num_kv_heads")
    single, bias = c.flag("multi_query", True), c.flag("bias", False)
    attention = Attention(
        heads,
        kv_heads=groups if newer else 1 if single else None,
        position=rotary(c),
        bias=bias,
        dropout=c.number("attention_dropout", 0.0),
    )
    ffn = FeedForward(c.integer("ffn_hidden_size", 4 * width), act=c.act("activation", "gelu"), bias=bias)
    norm, dropout = LayerNorm(c.number("layer_norm_epsilon", 1e-5)), c.number("hidden_dropout", 0.0)
    beside, norms = c.flag("parallel_attn", True) or newer, c.integer("num_ln_in_parallel_attn", 2)
    shared = norm if beside and (norms == 1 or not newer) else None
    own = None if shared else norm
    branches = {"attn": Branch(attention, pre=own, dropout=dropout), "ffn": Branch(ffn, pre=own, dropout=dropout)}
    return Sequence(
        width=width,
        embed=Tokens(c.integer("vocab_size")),
        stack=Stack(
            Parallel(pre=shared, **branches) if beside else Block(**branches), depth=c.depth("num_hidden_layers")
        ),
        norm=norm,
        head=head(c, default=True),
    )


@preset("falcon-7b")
def falcon_7b() -> dict[str, Any]:
    """32 layers 4544 wide with one key-value head, 6.9 B parameters (Almazrouei 2023)."""
    return {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "vocab_size": 65024, "hidden_size": 4544,
        "num_hidden_layers": 32, "num_attention_heads": 71, "layer_norm_epsilon": 1e-5, "multi_query": True,
        "parallel_attn": True, "new_decoder_architecture": False, "bias": False, "alibi": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0,
    }  # fmt: skip
