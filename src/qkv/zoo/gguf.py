"""What llama.cpp's files say of our families: keys of the metadata against keys of config.json, and names of tensors.

A row of a table of keys is read both ways. KEY stands in the file behind the architecture's name, `llama.block_count`.

    KEY CONFIG              one value under both names; rows that fill the same key of the config must agree
    : CONFIG VALUE          what the architecture means where the file says nothing
    ? CONFIG TENSOR         true where the file has that tensor
    # CONFIG TENSOR         its number of rows
    ! KEY VALUE             must be so, where it stands at all, and is written so
    ~ KEY [VALUE]           changes no number; written where there is a value, since readers ask for it

`rotary_width` is how many values of a head turn. It, the bases and the keys of ROPE_KEYS make up config.json's
`rope_parameters` (`checkpoints/gguf_rope.py`). What is usual is not written. Tables of names are as in
`checkpoints/names.py`.
"""

import dataclasses as dc
import json
from functools import cache
from typing import Any

from qkv.errors import QkvError
from qkv.models import Model, Sequence
from qkv.parts import Attention
from qkv.spec import nearest

# --- keys of the metadata ---

DECODER = """
    context_length                      max_position_embeddings
    embedding_length                    hidden_size
    block_count                         num_hidden_layers
    feed_forward_length                 intermediate_size
    attention.head_count                num_attention_heads
    attention.head_count_kv             num_key_value_heads
    attention.key_length                head_dim
    attention.value_length              head_dim
    attention.layer_norm_rms_epsilon    rms_norm_eps
    rope.dimension_count                rotary_width
    rope.freq_base                      rope_theta
    vocab_size                          vocab_size
    # vocab_size                        token_embd.weight
    ! attention.causal                  true
    ~ pooling_type
    ~ tensor_data_layout
"""

LLAMA = f"""{DECODER}
    : hidden_act                        "silu"
    ? attention_bias                    blk.0.attn_q.bias
"""

MISTRAL = f"""{DECODER}
    attention.sliding_window            sliding_window
    : hidden_act                        "silu"
"""

MIXTRAL = f"""{DECODER}
    expert_count                        num_local_experts
    expert_used_count                   num_experts_per_tok
    attention.sliding_window            sliding_window
    : hidden_act                        "silu"
"""

QWEN2 = f"""{DECODER}
    : hidden_act                        "silu"
"""

GEMMA2 = f"""{DECODER}
    attention.sliding_window            sliding_window
    attn_logit_softcapping              attn_logit_softcapping
    final_logit_softcapping             final_logit_softcapping
    : attn_logit_softcapping            50.0
    : final_logit_softcapping           30.0
    : sliding_window                    4096
    : hidden_activation                 "gelu_pytorch_tanh"
"""

GEMMA3 = f"""{DECODER}
    attention.sliding_window            sliding_window
    attention.sliding_window_pattern    sliding_window_pattern
    rope.freq_base_swa                  rope_local_base_freq
    final_logit_softcapping             final_logit_softcapping
    : rope_local_base_freq              10000.0
    : sliding_window_pattern            6
    : hidden_activation                 "gelu_pytorch_tanh"
"""

PHI3 = f"""{DECODER}
    attention.sliding_window            sliding_window
    : hidden_act                        "silu"
"""

GPT2 = """
    context_length                      n_positions
    embedding_length                    n_embd
    block_count                         n_layer
    feed_forward_length                 n_inner
    attention.head_count                n_head
    attention.head_count_kv             n_head
    attention.layer_norm_epsilon        layer_norm_epsilon
    vocab_size                          vocab_size
    # vocab_size                        token_embd.weight
    : activation_function               "gelu_new"
    ! attention.causal                  true
    ~ pooling_type
"""

NEOX = """
    context_length                      max_position_embeddings
    embedding_length                    hidden_size
    block_count                         num_hidden_layers
    feed_forward_length                 intermediate_size
    attention.head_count                num_attention_heads
    attention.layer_norm_epsilon        layer_norm_eps
    rope.dimension_count                rotary_width
    rope.freq_base                      rope_theta
    use_parallel_residual               use_parallel_residual
    vocab_size                          vocab_size
    # vocab_size                        token_embd.weight
    : hidden_act                        "gelu"
    ! attention.causal                  true
    ~ pooling_type
"""

MAMBA = """
    embedding_length                    hidden_size
    block_count                         num_hidden_layers
    attention.layer_norm_rms_epsilon    layer_norm_epsilon
    ssm.conv_kernel                     conv_kernel
    ssm.inner_size                      intermediate_size
    ssm.state_size                      state_size
    ssm.time_step_rank                  time_step_rank
    vocab_size                          vocab_size
    # vocab_size                        token_embd.weight
    ! ssm.dt_b_c_rms                    false
    ~ pooling_type
    ~ context_length                    1048576
    ~ feed_forward_length               0
    ~ attention.head_count              0
"""

BERT = """
    context_length                      max_position_embeddings
    embedding_length                    hidden_size
    block_count                         num_hidden_layers
    feed_forward_length                 intermediate_size
    attention.head_count                num_attention_heads
    attention.layer_norm_epsilon        layer_norm_eps
    vocab_size                          vocab_size
    # vocab_size                        token_embd.weight
    # type_vocab_size                   token_types.weight
    : hidden_act                        "gelu"
    : hidden_dropout_prob               0.1
    : attention_probs_dropout_prob      0.1
    ! attention.causal                  false
    ~ pooling_type
"""

ROPE_KEYS = """
    rope.scaling.type  rope.scaling.factor  rope.scaling.original_context_length  rope.scaling.attn_factor
    rope.scaling.finetuned  rope.scaling.yarn_beta_fast  rope.scaling.yarn_beta_slow
"""

# --- names of tensors ---

NAMES = """
    token_embd                              embed.tokens
    output_norm                             norm
    output                                  head
    blk.{i}.attn_norm                       stack.{i}.attn.pre
    blk.{i}.attn_{q,k,v,output}             stack.{i}.attn.f.{q,k,v,o}
    blk.{i}.attn_{q,k}_norm                 stack.{i}.attn.f.{q,k}_norm
    blk.{i}.ffn_norm                        stack.{i}.ffn.pre
    blk.{i}.ffn_{gate,up,down}              stack.{i}.ffn.f.{gate,up,down}
    ~ rope_freqs.weight
    ~ rope_factors_*.weight
"""

# Meta's layout, which the two members of a rotary pair share as neighbours.
ROPE = """
    blk.{{i}}.attn_q                        stack.{{i}}.attn.f.q        rope:{heads}
    blk.{{i}}.attn_k                        stack.{{i}}.attn.f.k        rope:{groups}
"""

EXPERTS = """
    blk.{i}.ffn_gate_inp                    stack.{i}.ffn.f.router.score
    blk.{i}.ffn_{gate,up,down}_exps.weight  stack.{i}.ffn.f.{gate,up,down}
    blk.{i}.ffn_{gate,up,down}.{e}.weight   stack.{i}.ffn.f.{gate,up,down}
"""

# Norms hold what they multiply by, while our Gemma learns what lies beyond 1.
BEYOND_ONE = """
    output_norm                             norm                        minus:1
    blk.{i}.attn_norm                       stack.{i}.attn.pre          minus:1
    blk.{i}.attn_{q,k}_norm                 stack.{i}.attn.f.{q,k}_norm minus:1
    blk.{i}.post_attention_norm             stack.{i}.attn.out          minus:1
    blk.{i}.ffn_norm                        stack.{i}.ffn.pre           minus:1
    blk.{i}.post_ffw_norm                   stack.{i}.ffn.out           minus:1
"""

QKV = """
    blk.{i}.attn_qkv                        stack.{i}.attn.f.{q,k,v}
"""

GATE_UP = """
    blk.{i}.ffn_up                          stack.{i}.ffn.f.{gate,up}
"""

POSITIONS = """
    position_embd                           embed.position
"""

ENCODER = """
    token_embd_norm                         embed.norm
    token_types                             embed.segments
    blk.{i}.attn_output_norm                stack.{i}.attn.post
    blk.{i}.layer_output_norm               stack.{i}.ffn.post
"""

STATES = """
    blk.{i}.attn_norm                       stack.{i}.mixer.pre
    blk.{i}.ssm_in                          stack.{i}.mixer.f.{x,z}
    blk.{i}.ssm_conv1d                      stack.{i}.mixer.f.x_conv
    blk.{i}.ssm_x                           stack.{i}.mixer.f.{dt_down,B,C}
    blk.{i}.ssm_dt.weight                   stack.{i}.mixer.f.dt_up.weight
    blk.{i}.ssm_dt.bias                     stack.{i}.mixer.f.dt_bias
    blk.{i}.ssm_a                           stack.{i}.mixer.f.A_log     log-minus
    blk.{i}.ssm_d                           stack.{i}.mixer.f.D
    blk.{i}.ssm_out                         stack.{i}.mixer.f.out
"""

ALWAYS_F32 = ("position_embd.weight", "token_types.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")
"""The ends of names of matrices that are always F32."""

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""`general.file_type` by the type of most matrices."""

POOLING = {"mean": 1, "first": 2, "last": 3}
"""`pooling_type` by what a pool takes of a text's tokens."""

# --- tokenizers ---

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""`tokenizer.ggml.token_type`."""

SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls", "mask": "mask",
}  # fmt: skip
"""The special tokens of tokenizer_config.json, as `tokenizer.ggml.*_token_id` spells them."""

BERT_TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
"""Those that a BERT has where its tokenizer_config.json does not say."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (WORDS % "{1,3}", "bytes"): "llama-bpe",
    (WORDS % "", "bytes"): "qwen2",
}
"""`tokenizer.ggml.pre` by how tokenizer.json cuts text."""


# --- architectures ---


@dc.dataclass(frozen=True)
class Keys:
    """A table of keys, taken apart."""

    rows: tuple[tuple[str, str], ...]
    usual: dict[str, Any]
    present: dict[str, str]
    counted: dict[str, str]
    fixed: dict[str, Any]
    inert: dict[str, Any]


@dc.dataclass(frozen=True)
class Architecture:
    """How llama.cpp writes one of our families."""

    name: str
    """`general.architecture`."""
    kind: str
    """`model_type` in config.json."""
    model: str
    """The class in config.json's `architectures`."""
    table: str
    """The table of keys."""
    names: str
    """Rows of names that go before the common ones."""
    sign: str | None = None
    """The key that tells it from others of its name."""
    wide: int | None = None
    """The number of layers of the one size whose scores are divided by √(C / heads), as √K is by the others."""

    @property
    def keys(self) -> Keys:
        return parsed(self.table)

    def tables(self, spec: Model) -> list[str]:
        """The table of names of a model: the first row that fits a parameter counts."""
        heads, groups = head_counts(spec)
        rope = ROPE.format(heads=heads, groups=groups) if self.name == "llama" else ""
        return [rope + self.names + NAMES]


ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", LLAMA, ""),
    Architecture("llama", "mixtral", "MixtralForCausalLM", MIXTRAL, EXPERTS, sign="expert_count"),
    Architecture("llama", "mistral", "MistralForCausalLM", MISTRAL, "", sign="attention.sliding_window"),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", QWEN2, ""),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", LLAMA, ""),
    Architecture("gemma2", "gemma2", "Gemma2ForCausalLM", GEMMA2, BEYOND_ONE, wide=46),
    Architecture("gemma3", "gemma3_text", "Gemma3ForCausalLM", GEMMA3, BEYOND_ONE, wide=62),
    Architecture("phi3", "phi3", "Phi3ForCausalLM", PHI3, QKV + GATE_UP),
    Architecture("gpt2", "gpt2", "GPT2LMHeadModel", GPT2, POSITIONS + QKV),
    Architecture("gptneox", "gpt_neox", "GPTNeoXForCausalLM", NEOX, QKV),
    Architecture("mamba", "mamba", "MambaForCausalLM", MAMBA, STATES),
    Architecture("bert", "bert", "BertModel", BERT, POSITIONS + ENCODER),
)


@cache
def parsed(table: str) -> Keys:
    """Take a table of keys apart."""
    rows: list[tuple[str, str]] = []
    marked: dict[str, dict[str, Any]] = {mark: {} for mark in ":?#!~"}
    for words in filter(None, map(str.split, table.splitlines())):
        if words[0] not in marked:
            rows.append((words[0], words[1]))
        else:
            said = words[2] if len(words) > 2 else "null"
            marked[words[0]][words[1]] = said if words[0] in "?#" else json.loads(said)
    return Keys(tuple(rows), marked[":"], marked["?"], marked["#"], marked["!"], marked["~"])


def architecture_of(name: str, keys: frozenset[str], where: str) -> Architecture:
    """The family of a file by `general.architecture` and the keys that stand behind that name."""
    found = [one for one in ARCHITECTURES if one.name == name]
    if not found:
        raise QkvError(f"{where}: qkv does not know the architecture {name!r}{nearest(name, known())}")
    signed = [one for one in found if one.sign in keys]
    return signed[0] if signed else found[0]


def architecture_for(kind: str) -> Architecture:
    """How a family of ours, by its `model_type`, is written."""
    for one in ARCHITECTURES:
        if one.kind == kind:
            return one
    raise QkvError(f"GGUF has no form for a {kind!r} model that qkv knows; it writes {', '.join(known())}")


def known() -> list[str]:
    return sorted({one.name for one in ARCHITECTURES})


def head_counts(spec: Model) -> tuple[int, int]:
    """How many heads of queries and of keys each layer has; 0 where there is no attention."""
    if isinstance(spec, Sequence):
        for branch in spec.stack.blocks[0].branches.values():
            if isinstance(branch.f, Attention):
                return branch.f.heads, branch.f.kv_heads or branch.f.heads
    return 0, 0
