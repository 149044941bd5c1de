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
        Files,
        Tokenizers,
        TrainingBatches,
        by_length,
        evaluation_batches,
        pad_rows,
        records,
        train_tokenizers,
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
    "evaluation_batches",
    "load_tokenizer",
    "pad_rows",
    "read",
    "records",
    "tokenizer_from_gguf",
    "tokenizer_from_llama2c",
    "train_tokenizer",
    "train_tokenizers",
]

_LATER = {"ChatTemplate": "qkv.data.chat"} | dict.fromkeys(
    (
        "Batch",
        "Data",
        "Files",
        "Tokenizers",
        "TrainingBatches",
        "by_length",
        "evaluation_batches",
        "pad_rows",
        "records",
        "train_tokenizers",
    ),
    "qkv.data.batches",
)


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'qkv.data' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
