"""What tells how good predictions are; the libraries that the field quotes do the counting."""

from collections.abc import Sequence
from types import ModuleType
from typing import ClassVar

from qkv.errors import QkvError
from qkv.spec import Spec, part


class Metric(Spec):
    """The first value of `score` is the one by which the best checkpoint is chosen."""

    reads_text: ClassVar[bool] = True
    """Whether it compares predicted texts; otherwise the validation loss is all it needs."""
    higher: ClassVar[bool] = True
    """Whether more is better."""
    alternatives: ClassVar[bool] = False
    """Whether the targets of lines with one source are alternatives, as of a word that is said in two ways; otherwise
    every line counts by itself, with its own target, as in the scores that are published."""

    def score(self, predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
        """Values by name; each prediction may have several references."""
        raise AssertionError(f"{type(self).__name__} does not say how it scores")


@part("loss")
class ValidationLoss(Metric):
    """The validation loss, nats per token."""

    reads_text: ClassVar[bool] = False
    higher: ClassVar[bool] = False

    def score(self, predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
        return {}


def columns(references: Sequence[tuple[str, ...]]) -> list[list[str | None]]:
    """The references as sacrebleu takes them: one list for each, padded with None."""
    most = max(map(len, references))
    return [[row[n] if n < len(row) else None for row in references] for n in range(most)]


@part("bleu")
class BLEU(Metric):
    """Corpus BLEU by sacrebleu (Post 2018), 0 to 100."""

    lowercase: bool = False

    def score(self, predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
        bleu = sacrebleu().BLEU(lowercase=self.lowercase)
        return {"bleu": bleu.corpus_score(list(predictions), columns(references)).score}


@part("chrf")
class ChrF(Metric):
    """Character n-gram F-score by sacrebleu (Popović 2015), 0 to 100: for languages without spaces too."""

    def score(self, predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
        return {"chrf": sacrebleu().CHRF().corpus_score(list(predictions), columns(references)).score}


@part("error-rate")
class ErrorRate(Metric):
    """Per cent of texts that equal none of their references, and edits per symbol against the nearest reference.

    Symbols are what spaces separate: phonemes, or words.
    """

    higher: ClassVar[bool] = False
    alternatives: ClassVar[bool] = True

    def score(self, predictions: Sequence[str], references: Sequence[tuple[str, ...]]) -> dict[str, float]:
        try:
            from rapidfuzz.distance import Levenshtein
        except ImportError as missing:
            raise QkvError('error rates need rapidfuzz: pip install "qkv[train]"') from missing
        wrong = edits = symbols = 0
        for prediction, row in zip(predictions, references, strict=True):
            found = prediction.split()
            distance, length = min((Levenshtein.distance(found, r.split()), len(r.split())) for r in row)
            wrong, edits, symbols = wrong + (distance > 0), edits + distance, symbols + length
        return {"word_error": 100 * wrong / len(predictions), "symbol_error": 100 * edits / max(1, symbols)}


def sacrebleu() -> ModuleType:
    """The library's metrics."""
    try:
        from sacrebleu import metrics
    except ImportError as missing:
        raise QkvError('this metric needs sacrebleu: pip install "qkv[train]"') from missing
    return metrics
