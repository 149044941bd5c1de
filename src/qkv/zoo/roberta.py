"""RoBERTa: BERT trained longer, whose positions are numbered behind the padding's id (Liu 2019); XLM-R, CamemBERT."""

from typing import Any

from qkv.models import Sequence
from qkv.parts import Pool, Transform
from qkv.zoo.config import Config
from qkv.zoo.encoder import BODY, classifier, encoder, head, last_dropout, norm, vocabulary
from qkv.zoo.registry import family, preset

HEADS = """
    lm_head.dense               head.transform.dense
    lm_head.layer_norm          head.transform.norm
    qa_outputs                  head.ends
    + roberta.pooler.*
"""


def names(spec: Sequence) -> str:
    return BODY.replace("bert.", "roberta.") + HEADS + vocabulary(spec, "lm_head") + classifier(spec)


@family("roberta", "xlm-roberta", "camembert", names=names, prefix="roberta.")
def roberta(c: Config) -> Sequence:
    """RoBERTa, XLM-R (Conneau 2020) and CamemBERT (Martin 2020), which are one form."""
    dropout = last_dropout(c)
    pool = Pool(transform=Transform("tanh"), dropout=dropout)
    top = head(c, Transform("gelu", norm=norm(c)), pool, dropout)
    return encoder(c, top, offset=c.integer("pad_token_id", 1, least=0) + 1)


def base(kind: str, stem: str, vocab: int) -> dict[str, Any]:
    return {
        "model_type": kind, "architectures": [f"{stem}ForMaskedLM"], "vocab_size": vocab, "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 514,
        "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip


@preset("roberta-base")
def roberta_base() -> dict[str, Any]:
    """12 layers 768 wide, 125 M parameters (Liu 2019)."""
    return base("roberta", "Roberta", 50265)


@preset("xlm-roberta-base")
def xlm_roberta_base() -> dict[str, Any]:
    """12 layers 768 wide, 100 languages, 278 M parameters (Conneau 2020)."""
    return base("xlm-roberta", "XLMRoberta", 250002)
