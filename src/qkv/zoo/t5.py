"""T5: an encoder and a decoder, pre-norm, without biases, a table of relative positions for each (Raffel 2020).

mT5 is 1.1 in many languages (Xue 2021).
"""

from typing import Any

from qkv.errors import QkvError
from qkv.masks import Full
from qkv.models import EncoderDecoder, Model, Sequence
from qkv.parts import (
    Attention,
    Block,
    Branch,
    FeedForward,
    Gated,
    Head,
    Mixer,
    Output,
    Relative,
    RMSNorm,
    ScaledDot,
    Shared,
    Span,
    Stack,
    Tokens,
)  # fmt: skip
from qkv.zoo.config import ACTIVATIONS, Config
from qkv.zoo.registry import family, preset

NAMES = """
    shared                                                  source.tokens
    = encoder.embed_tokens                                  source.tokens
    = decoder.embed_tokens                                  source.tokens
    {encoder,decoder}.block.0.layer.0.SelfAttention.relative_attention_bias     {encoder,decoder}.shared.relative
    {encoder,decoder}.block.{i}.layer.0.SelfAttention.{q,k,v,o}                 {encoder,decoder}.{i}.attn.f.{q,k,v,o}
    {encoder,decoder}.block.{i}.layer.0.layer_norm          {encoder,decoder}.{i}.attn.pre
    decoder.block.{i}.layer.1.EncDecAttention.{q,k,v,o}     decoder.{i}.cross.f.{q,k,v,o}
    decoder.block.{i}.layer.1.layer_norm                    decoder.{i}.cross.pre
    encoder.block.{i}.layer.1.DenseReluDense.{wi,wo}        encoder.{i}.ffn.f.{up,down}
    decoder.block.{i}.layer.2.DenseReluDense.{wi,wo}        decoder.{i}.ffn.f.{up,down}
    encoder.block.{i}.layer.1.layer_norm                    encoder.{i}.ffn.pre
    decoder.block.{i}.layer.2.layer_norm                    decoder.{i}.ffn.pre
    {encoder,decoder}.final_layer_norm                      {encoder_norm,decoder_norm}
    lm_head                                                 head
    = lm_head.weight                                        source.tokens.weight
    qa_outputs                                              head.ends
    + decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight
"""

ENCODER = """
    shared                                                  embed.tokens
    = encoder.embed_tokens                                  embed.tokens
    encoder.block.0.layer.0.SelfAttention.relative_attention_bias               stack.shared.relative
    encoder.block.{i}.layer.0.SelfAttention.{q,k,v,o}       stack.{i}.attn.f.{q,k,v,o}
    encoder.block.{i}.layer.1.DenseReluDense.{wi,wo}        stack.{i}.ffn.f.{up,down}
    encoder.block.{i}.layer.{0,1}.layer_norm                stack.{i}.{attn,ffn}.pre
    encoder.final_layer_norm                                norm
"""


def names(spec: EncoderDecoder | Sequence) -> str:
    """Plain feed-forwards have one matrix `wi`, gated ones two."""
    stack, table = (spec.stack, ENCODER) if isinstance(spec, Sequence) else (spec.encoder, NAMES)
    gated = isinstance(stack.blocks[0].branches["ffn"].f, Gated)
    return table.replace("{wi,wo}", "{wi_0,wi_1,wo}").replace("{up,down}", "{gate,up,down}") if gated else table


@family("t5", "mt5", names=names)
def t5(c: Config) -> Model:
    """T5 1.0, whose head reads the embedding's table times C^(−1/2), and 1.1, gated and with a head of its own.

    Dropout within a feed-forward and after each stack acts in training only and is left out.
    """
    c.ignore("n_positions", "initializer_factor", "classifier_dropout")
    width, depth, ffn = c.integer("d_model"), c.depth("num_layers"), feedforward(c)
    norm, dropout = RMSNorm(c.number("layer_norm_epsilon", 1e-6)), c.number("dropout_rate", 0.1)

    def branch(f: Mixer) -> Branch:
        return Branch(f, pre=norm, dropout=dropout)

    def attention(over: str | None = None) -> Branch:
        heads, size, dot = c.integer("num_heads"), c.integer("d_kv", 64), ScaledDot(scale=1.0)
        position = None if over else Shared("relative")
        return branch(Attention(heads, head_width=size, over=over, score=dot, position=position, dropout=dropout))

    def stack(block: Block, depth: int, both: bool) -> Stack:
        far = c.integer("relative_attention_max_distance", 128)
        relative = Relative(c.integer("relative_attention_num_buckets", 32), far=far, both=both)
        return Stack(block, depth=depth, shared={"relative": relative})

    tokens = Tokens(c.integer("vocab_size"), dropout=dropout)
    encoder = stack(Block(attn=attention(), ffn=branch(ffn)), depth, both=True)
    block = Block(attn=attention(), cross=attention(over="memory"), ffn=branch(ffn))
    decoder = stack(block, c.depth("num_decoder_layers", depth), both=False)
    top = head(c, width)
    if c.values.get("architectures") in (["T5EncoderModel"], ["MT5EncoderModel"]):
        return Sequence(width=width, embed=tokens, stack=encoder, mask=Full(), norm=norm)
    return EncoderDecoder(
        width=width, source=tokens, encoder=encoder, decoder=decoder, encoder_norm=norm, decoder_norm=norm, head=top
    )


def feedforward(c: Config) -> Mixer:
    """`feed_forward_proj` names the activation, with `gated-` before it where a second matrix is the gate."""
    hidden, said = c.integer("d_ff"), c.text("feed_forward_proj", "gated-gelu" if multilingual(c) else "relu")
    gate, _, name = said.rpartition("-")
    name = "gelu_new" if said == "gated-gelu" else name
    if name not in ACTIVATIONS or gate not in ("", "gated"):
        c.only("feed_forward_proj", "relu", "gated-gelu", "gated-silu")
    c.only("dense_act_fn", name)
    c.only("is_gated_act", bool(gate))
    return Gated(hidden, act=ACTIVATIONS[name]) if gate else FeedForward(hidden, act=ACTIVATIONS[name], bias=False)


def multilingual(c: Config) -> bool:
    return bool(c.values.get("model_type") == "mt5")


def head(c: Config, width: int) -> Output | None:
    """The package has come to call every model tied; then `scale_decoder_outputs` and the file tell 1.1 from 1.0.

    Of mT5, which is never scaled, it always did.
    """
    said = c.flag("tie_word_embeddings", True)
    scaled = c.flag("scale_decoder_outputs", said and not multilingual(c))
    own = "lm_head.weight" in c.keys and not (said and scaled)
    first = c.values.get("architectures") == ["T5WithLMHeadModel"]  # as it was called
    match "ConditionalGeneration" if first else c.task:
        case "ConditionalGeneration":
            return Head(tied=c.tied("lm_head.weight") and not own, scale=width**-0.5 if scaled else None)
        case "QuestionAnswering":
            c.only("num_labels", 2)
            return Span()
        case "":
            return None
    raise QkvError(f"qkv knows no {c.values.get('model_type')} model for {c.task}")


def sized(width: int, heads: int, depth: int, hidden: int, **changes: Any) -> dict[str, Any]:
    return {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128, "d_model": width,
        "d_kv": 64, "d_ff": hidden, "num_layers": depth, "num_decoder_layers": depth, "num_heads": heads,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6, "feed_forward_proj": "relu", "tie_word_embeddings": True, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0, **changes,
    }  # fmt: skip


@preset("t5-small")
def small() -> dict[str, Any]:
    """6 + 6 layers 512 wide, 61 M parameters (Raffel 2020)."""
    return sized(512, 8, 6, 2048)


@preset("t5-base")
def base() -> dict[str, Any]:
    """12 + 12 layers 768 wide, 223 M parameters (Raffel 2020)."""
    return sized(768, 12, 12, 3072)


@preset("t5-v1.1-small")
def small_gated() -> dict[str, Any]:
    """8 + 8 layers 512 wide, 77 M parameters, trained on C4 alone."""
    return sized(512, 6, 8, 1024, feed_forward_proj="gated-gelu", tie_word_embeddings=False)


@preset("mt5-small")
def small_multilingual() -> dict[str, Any]:
    """8 + 8 layers 512 wide for 101 languages, 300 M parameters (Xue 2021)."""
    gated = sized(512, 6, 8, 1024, feed_forward_proj="gated-gelu", tie_word_embeddings=False, vocab_size=250112)
    return {**gated, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}
