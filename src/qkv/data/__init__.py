"""Text becomes batches: files → records → tokens → pools → batches.

Importing this room imports no torch: batches, which need it, are imported when they are first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkv.data.files import Record, Synthetic, read
from qkv.data.gguf import tokenizer_from_gguf
from qkv.data.llama2c import tokenizer_from_llama2c
from qkv.data.pretrained import load_tokenizer
from qkv.data.synthetic import AssociativeRecall
from qkv.data.tokenizer import Encoded, TextStream, Tokenizer
from qkv.data.tokenizers import (
    BPE,
    Character,
    Symbols,
    TokenizerSpec,
    Unigram,
    Word,
    WordPiece,
    train_tokenizer,
)

if TYPE_CHECKING:
    from qkv.data.batches import (
        Batch,
        Data,
        EvaluationBatches,
        Files,
        Tokenizers,
        TrainingBatches,
        by_length,
        pad_rows,
        records,
        train_tokenizers,
        training_records,
    )
    from qkv.data.chat import ChatTemplate

__all__ = [
    "BPE",
    "AssociativeRecall",
    "Batch",
    "Character",
    "ChatTemplate",
    "Data",
    "Encoded",
    "EvaluationBatches",
    "Files",
    "Record",
    "Symbols",
    "Synthetic",
    "TextStream",
    "Tokenizer",
    "TokenizerSpec",
    "Tokenizers",
    "TrainingBatches",
    "Unigram",
    "Word",
    "WordPiece",
    "by_length",
    "load_tokenizer",
    "pad_rows",
    "read",
    "records",
    "tokenizer_from_gguf",
    "tokenizer_from_llama2c",
    "train_tokenizer",
    "train_tokenizers",
    "training_records",
]

_LATER = {"ChatTemplate": "qkv.data.chat"} | dict.fromkeys(
    (
        "Batch",
        "Data",
        "Files",
        "Tokenizers",
        "TrainingBatches",
        "by_length",
        "EvaluationBatches",
        "pad_rows",
        "records",
        "train_tokenizers",
        "training_records",
    ),
    "qkv.data.batches",
)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'qkv.data' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
