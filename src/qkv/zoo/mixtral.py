"""Mixtral: Mistral with a sparse mixture of experts in place of each feed-forward (Jiang 2024)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Experts, TopK
from qkv.zoo.config import Config
from qkv.zoo.decoder import attention, decoder, sized, window
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import rotary

NAMES = """
    model.embed_tokens                                                  embed.tokens
    model.layers.{i}.input_layernorm                                    stack.{i}.attn.pre
    model.layers.{i}.self_attn.{q,k,v,o}_proj                           stack.{i}.attn.f.{q,k,v,o}
    model.layers.{i}.post_attention_layernorm                           stack.{i}.ffn.pre
    model.layers.{i}.block_sparse_moe.gate                              stack.{i}.ffn.f.router.score
    model.layers.{i}.block_sparse_moe.experts.{e}.{w1,w3,w2}.weight     stack.{i}.ffn.f.{gate,up,down}
    model.norm                                                          norm
    lm_head                                                             head
    = lm_head.weight                                                    embed.tokens.weight
    score                                                               head.out
    qa_outputs                                                          head.ends
    ~ *.rotary_emb.inv_freq
"""


@family("mixtral", names=NAMES, prefix="model.")
def mixtral(c: Config) -> Sequence:
    """Mixtral 8x7B and 8x22B."""
    c.only("router_jitter_noise", 0.0)
    c.ignore("output_router_logits", "router_aux_loss_coef")  # of the loss, where a recipe asks for one
    experts = Experts(
        c.integer("intermediate_size"),
        count=c.integer("num_local_experts", 8),
        router=TopK(c.integer("num_experts_per_tok", 2)),
        act=c.act("hidden_act", "silu"),
    )
    return decoder(c, [attention(c, mask=window(c), position=rotary(c, theta=1000000.0))], experts)


@preset("mixtral-8x7b")
def mixtral_8x7b() -> dict[str, Any]:
    """32 layers 4096 wide, 2 of 8 experts for each token, 47 B parameters, of which 13 B read a token (Jiang 2024)."""
    return sized(
        "mixtral", "Mixtral", 4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=32000,
        max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
        num_experts_per_tok=2, num_local_experts=8, tie_word_embeddings=False, attention_dropout=0.0,
        output_router_logits=False, router_aux_loss_coef=0.02,
    )  # fmt: skip
