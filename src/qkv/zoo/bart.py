"""BART and mBART: an encoder and a decoder with learned positions (Lewis 2019, Liu 2020)."""

from typing import Any

from qkv.errors import QkvError
from qkv.models import EncoderDecoder
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    FeedForward,
    Head,
    LayerNorm,
    Learned,
    Mixer,
    Output,
    Pool,
    Span,
    Stack,
    TiedTokens,
    Tokens,
    Transform,
)  # fmt: skip
from qkv.zoo.config import Config
from qkv.zoo.registry import family, preset

LAYERS = """
    model.{encoder,decoder}.layers.{i}.self_attn.{q,k,v,out}_proj   {encoder,decoder}.{i}.attn.f.{q,k,v,o}
    model.{encoder,decoder}.layers.{i}.self_attn_layer_norm         {encoder,decoder}.{i}.attn.post
    model.decoder.layers.{i}.encoder_attn.{q,k,v,out}_proj          decoder.{i}.cross.f.{q,k,v,o}
    model.decoder.layers.{i}.encoder_attn_layer_norm                decoder.{i}.cross.post
    model.{encoder,decoder}.layers.{i}.{fc1,fc2}                    {encoder,decoder}.{i}.ffn.f.{up,down}
    model.{encoder,decoder}.layers.{i}.final_layer_norm             {encoder,decoder}.{i}.ffn.post
    final_logits_bias                                               head.bias       squeeze:0
"""

SHARED = """
    model.shared                                                    source.tokens
    = model.encoder.embed_tokens                                    source.tokens
    = model.decoder.embed_tokens                                    source.tokens
    = lm_head                                                       source.tokens
"""

NAMES = f"""
    {LAYERS}
    {SHARED}
    model.{{encoder,decoder}}.embed_positions                       {{source,target}}.position
    model.{{encoder,decoder}}.layernorm_embedding                   {{source,target}}.norm
    model.{{encoder,decoder}}.layer_norm                            {{encoder_norm,decoder_norm}}
    classification_head.{{dense,out_proj}}                          head.{{pool.transform.dense,out}}
    qa_outputs                                                      head.ends
"""


@family("bart", names=NAMES, prefix="model.")
def bart(c: Config) -> EncoderDecoder:
    """BART: normalised after each branch, as in the Transformer of 2017."""
    return learned(c)


@family("mbart", names=NAMES.replace(".post", ".pre"), prefix="model.")
def mbart(c: Config) -> EncoderDecoder:
    """mBART: normalised before each branch, and once more at the end of each stack."""
    return learned(c, pre=True)


def learned(c: Config, pre: bool = False) -> EncoderDecoder:
    """Positions and norm of each side are its own; the table of tokens is that of both sides and of the head."""
    c.only("static_position_embeddings", False)
    c.only("normalize_embedding", True)
    c.only("extra_pos_embeddings", 2)
    c.only("tie_word_embeddings", True)
    position = Learned(c.integer("max_position_embeddings", 1024) + 2, offset=2)
    norm, scaled, dropout = LayerNorm(), c.flag("scale_embedding", False), c.number("dropout", 0.1)
    source = Tokens(c.integer("vocab_size"), position=position, norm=norm, scaled=scaled, dropout=dropout)
    target = TiedTokens(position=position, norm=norm, scaled=scaled, dropout=dropout)
    return encoder_decoder(c, source, target, head(c), pre=pre)


def head(c: Config) -> Output | None:
    """What the class of a model puts on top of the decoder."""
    dropout = c.number("classifier_dropout", 0.0)
    match c.task:
        case "ConditionalGeneration":
            return Head(tied=True, bias=True)
        case "SequenceClassification":  # reads the end of the text, given to encoder and decoder alike
            return Classifier(
                c.labels(), pool=Pool("last", transform=Transform("tanh"), dropout=dropout), dropout=dropout
            )
        case "QuestionAnswering":
            return Span()
        case "":
            return None
    raise QkvError(f"qkv knows no {c.values['model_type']} model for {c.task}")


def encoder_decoder(
    c: Config, source: Tokens, target: Tokens | TiedTokens | None, head: Output | None, *, pre: bool = False
) -> EncoderDecoder:
    """What Marian shares. Dropout within a feed-forward and of whole layers acts in training only and is left out."""
    c.ignore("activation_dropout", "encoder_layerdrop", "decoder_layerdrop", "init_std", "classif_dropout")
    c.ignore("add_bias_logits", "force_bos_token_to_be_generated", "save_step", "classifier_dropout")
    c.only("normalize_before", pre)
    c.only("add_final_layer_norm", pre)
    c.only("do_blenderbot_90_layernorm", False)
    c.only("num_hidden_layers", c.depth("encoder_layers"))
    norm, act, dropout = LayerNorm(), c.act("activation_function", "gelu"), c.number("dropout", 0.1)

    def branch(f: Mixer) -> Branch:
        return Branch(f, pre=norm, dropout=dropout) if pre else Branch(f, post=norm, dropout=dropout)

    def attention(side: str, over: str | None = None) -> Branch:
        heads, dropped = c.integer(f"{side}_attention_heads"), c.number("attention_dropout", 0.0)
        return branch(Attention(heads, over=over, bias=True, dropout=dropped))

    def ffn(side: str) -> Branch:
        return branch(FeedForward(c.integer(f"{side}_ffn_dim"), act=act))

    encoder = Block(attn=attention("encoder"), ffn=ffn("encoder"))
    decoder = Block(attn=attention("decoder"), cross=attention("decoder", over="memory"), ffn=ffn("decoder"))
    return EncoderDecoder(
        width=c.integer("d_model"),
        source=source,
        encoder=Stack(encoder, depth=c.depth("encoder_layers")),
        decoder=Stack(decoder, depth=c.depth("decoder_layers")),
        target=target,
        encoder_norm=norm if pre else None,
        decoder_norm=norm if pre else None,
        head=head,
    )


def sized(width: int, heads: int, depth: int) -> dict[str, Any]:
    return {
        "model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 50265, "d_model": width,
        "encoder_layers": depth, "decoder_layers": depth, "encoder_attention_heads": heads,
        "decoder_attention_heads": heads, "encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width,
        "activation_function": "gelu", "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1,
        "classifier_dropout": 0.0, "max_position_embeddings": 1024, "scale_embedding": False, "bos_token_id": 0,
        "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
    }  # fmt: skip


@preset("bart-base")
def base() -> dict[str, Any]:
    """6 + 6 layers 768 wide, 139 M parameters (Lewis 2019)."""
    return sized(768, 12, 6)


@preset("bart-large")
def large() -> dict[str, Any]:
    """12 + 12 layers 1024 wide, 406 M parameters (Lewis 2019)."""
    return sized(1024, 16, 12)
