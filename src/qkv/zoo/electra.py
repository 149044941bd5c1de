"""ELECTRA: a generator that fills masks and a discriminator that finds what it replaced (Clark 2020)."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Pool, Tagger, Transform
from qkv.zoo.config import Config
from qkv.zoo.encoder import BODY, classifier, encoder, head, last_dropout, norm
from qkv.zoo.registry import family, preset

HEADS = """
    electra.embeddings_project                              embed.project
    qa_outputs                                              head.ends
"""

GENERATOR = """
    generator_predictions.{dense,LayerNorm}                 head.transform.{dense,norm}
    generator_lm_head                                       head
    = generator_lm_head.weight                              embed.tokens.weight
"""

DISCRIMINATOR = """
    discriminator_predictions.{dense,dense_prediction}      head.{transform.dense,out}
"""


def names(spec: Sequence) -> str:
    found = isinstance(spec.head, Tagger) and spec.head.transform is not None
    last = DISCRIMINATOR if found else GENERATOR + classifier(spec)
    return BODY.replace("bert.", "electra.") + HEADS + last


@family("electra", names=names, prefix="electra.")
def electra(c: Config) -> Sequence:
    """Generators (MaskedLM) and discriminators (PreTraining), whose one score says how surely a token was replaced."""
    c.ignore("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout")  # of multiple choice
    width, inner, dropout = c.integer("hidden_size"), c.integer("embedding_size"), last_dropout(c)
    pool = Pool(transform=Transform("gelu"), dropout=dropout)
    top = head(c, Transform("gelu", norm=norm(c), width=inner), pool, dropout)
    if c.task == "PreTraining":
        top = Tagger(("replaced",), transform=Transform(c.act("hidden_act")))
    return encoder(c, top, inner=None if inner == width else inner)


@preset("electra-small")
def small() -> dict[str, Any]:
    """The discriminator with 12 layers 256 wide, 14 M parameters (Clark 2020)."""
    return {
        "model_type": "electra", "architectures": ["ElectraForPreTraining"], "vocab_size": 30522,
        "embedding_size": 128, "hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4,
        "intermediate_size": 1024, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 512, "type_vocab_size": 2,
        "layer_norm_eps": 1e-12, "pad_token_id": 0,
    }  # fmt: skip
