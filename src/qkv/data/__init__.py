"""Text becomes batches: files → records → tokens → pools → batches."""

from qkv.data.batches import (
    Batch,
    Data,
    Tokenizers,
    TrainingBatches,
    by_length,
    evaluation_batches,
    pad_rows,
    train_tokenizers,
)
from qkv.data.files import Record, read
from qkv.data.tokenizers import (
    BPE,
    Character,
    Symbols,
    Tokenizer,
    TokenizerSpec,
    Unigram,
    Word,
    WordPiece,
    train_tokenizer,
)

__all__ = [
    "BPE",
    "Batch",
    "Character",
    "Data",
    "Record",
    "Symbols",
    "Tokenizer",
    "TokenizerSpec",
    "Tokenizers",
    "TrainingBatches",
    "Unigram",
    "Word",
    "WordPiece",
    "by_length",
    "evaluation_batches",
    "pad_rows",
    "read",
    "train_tokenizer",
    "train_tokenizers",
]
