"""The tokenizer of llama2.c's tokenizer.bin. Imports no torch."""

from collections.abc import Sequence
from itertools import chain

from qkv.data.kinds import frame, plain
from qkv.data.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, of_pieces
from qkv.data.tokenizer import Tokenizer, library_errors
from qkv.errors import QkvError


def tokenizer_from_llama2c(pieces: Sequence[bytes], scores: Sequence[float]) -> Tokenizer:
    """The tokenizer of llama2.c's tokenizer.bin: <unk>, <s>, </s>, the 256 bytes, then pieces with real spaces."""
    with library_errors("the tokenizer of llama2.c cannot be made"):
        if len(pieces) < 259 or len(pieces) != len(scores):
            raise QkvError(
                f"{len(pieces)} pieces with {len(scores)} scores are no tokenizer of llama2.c, which has 259 first"
            )
        first = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{i:02X}>", BYTE) for i in range(256))]
        rest = ((piece.decode().replace(" ", "▁"), NORMAL) for piece in pieces[259:])
        spelt = [(text, float(score), kind) for (text, kind), score in zip(chain(first, rest), scores, strict=True)]
        library = of_pieces(spelt, "always")
        frame(library, *plain(1, None))
        return Tokenizer(library, {"unknown": 0, "begin": 1, "end": 2})
