"""GPT-NeoX and Pythia: attention and feed-forward side by side, each with a norm of its own (Black 2022)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, LayerNorm, Parallel, Stack, Tokens
from qkv.zoo.config import Config
from qkv.zoo.decoder import head
from qkv.zoo.gpt2 import labelled
from qkv.zoo.registry import family, preset
from qkv.zoo.rope import rotary

NAMES = """
    gpt_neox.embed_in                                   embed.tokens
    gpt_neox.layers.{i}.input_layernorm                 stack.{i}.attn.pre
    gpt_neox.layers.{i}.attention.query_key_value       stack.{i}.attn.f.{q,k,v}    ungroup:HEADS:1
    gpt_neox.layers.{i}.attention.dense                 stack.{i}.attn.f.o
    gpt_neox.layers.{i}.post_attention_layernorm        stack.{i}.ffn.pre
    gpt_neox.layers.{i}.mlp.dense_h_to_4h               stack.{i}.ffn.f.up
    gpt_neox.layers.{i}.mlp.dense_4h_to_h               stack.{i}.ffn.f.down
    gpt_neox.final_layer_norm                           norm
    embed_out                                           head
    = embed_out.weight                                  embed.tokens.weight
    qa_outputs                                          head.ends
    ~ *.attention.bias
    ~ *.attention.masked_bias
    ~ *.rotary_emb.inv_freq
"""


def names(spec: Sequence) -> str:
    """The rows of each head's query, key and value stand together in the file."""
    attention = spec.stack.blocks[0].branches["attn"].f
    assert isinstance(attention, Attention)
    return labelled(NAMES.replace("HEADS", str(attention.heads)))(spec)


@family("gpt_neox", names=names, prefix="gpt_neox.")
def neox(c: Config) -> Sequence:
    """GPT-NeoX, Pythia and StableLM's first version."""
    c.ignore("classifier_dropout", "rotary_pct", "rotary_emb_base", "max_position_embeddings")
    norm = LayerNorm(c.number("layer_norm_eps", 1e-5))
    dropout = c.number("hidden_dropout", c.number("hidden_dropout_prob", 0.0))
    position = rotary(c, theta=c.number("rotary_emb_base", 10000.0), fraction=c.number("rotary_pct", 0.25))
    attention = Attention(
        c.integer("num_attention_heads"),
        position=position,
        bias=c.flag("attention_bias", True),
        dropout=c.number("attention_dropout", c.number("attention_probs_dropout_prob", 0.0)),
    )
    ffn = FeedForward(c.integer("intermediate_size"), act=c.act("hidden_act", "gelu"))
    form = Parallel if c.flag("use_parallel_residual", True) else Block
    block = form(attn=Branch(attention, pre=norm, dropout=dropout), ffn=Branch(ffn, pre=norm, dropout=dropout))
    return Sequence(
        width=c.integer("hidden_size"),
        embed=Tokens(c.integer("vocab_size"), dropout=dropout),
        stack=Stack(block, depth=c.depth("num_hidden_layers")),
        norm=norm,
        head=head(c, matrix="embed_out.weight"),
    )


def pythia(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "vocab_size": 50304, "hidden_size": width,
        "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": 4 * width, "hidden_act": "gelu",
        "max_position_embeddings": 2048, "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "use_parallel_residual": True, "tie_word_embeddings": False,
    }  # fmt: skip


@preset("pythia-70m")
def pythia_70m() -> dict[str, Any]:
    """6 layers 512 wide, 70 M parameters (Biderman 2023)."""
    return pythia(512, 8, 6)


@preset("pythia-160m")
def pythia_160m() -> dict[str, Any]:
    """12 layers 768 wide, 162 M parameters (Biderman 2023)."""
    return pythia(768, 12, 12)
