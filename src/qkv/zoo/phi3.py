"""Phi-3 and Phi-4: LLaMA's form, with queries, keys and values in one matrix of the file (Abdin 2024)."""

from typing import Any

from qkv.models import Sequence
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, decoder, window
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import rotary

NAMES = """
    model.embed_tokens                              embed.tokens
    model.layers.{i}.input_layernorm                stack.{i}.attn.pre
    model.layers.{i}.self_attn.qkv_proj             stack.{i}.attn.f.{q,k,v}
    model.layers.{i}.self_attn.o_proj               stack.{i}.attn.f.o
    model.layers.{i}.post_attention_layernorm       stack.{i}.ffn.pre
    model.layers.{i}.mlp.gate_up_proj               stack.{i}.ffn.f.{gate,up}
    model.layers.{i}.mlp.down_proj                  stack.{i}.ffn.f.down
    model.norm                                      norm
    lm_head                                         head
    = lm_head.weight                                embed.tokens.weight
    score                                           head.out
    ~ *.rotary_emb.inv_freq
"""


@family("phi3", names=NAMES, prefix="model.")
def phi3(c: Config) -> Sequence:
    """Phi-3, Phi-3.5 and Phi-4."""
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        c.only(key, False)
    for key in ("full_attn_mod", "interpolate_factor"):
        c.only(key, 1)
    c.only("embd_pdrop", 0.0)
    position = rotary(c, fraction=1.0)
    return decoder(c, [attention(c, mask=window(c), position=position)], dropout=c.number("resid_pdrop", 0.0))


@preset("phi-3-mini")
def mini() -> dict[str, Any]:
    """Phi-3-mini for texts of 4096 tokens: 32 layers 3072 wide, 3.8 B parameters (Abdin 2024)."""
    return {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 32064, "hidden_size": 3072,
        "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "hidden_act": "silu", "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047,
        "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }  # fmt: skip
