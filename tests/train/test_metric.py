"""Metrics by hand, and against the library called directly."""

import pytest
import sacrebleu

from qkv.train import BLEU, ChrF, ErrorRate


def test_error_rates_take_the_nearest_reference():
    predictions = ["K AE T", "D AO G", "", "A B C D"]
    references = [("K AE T",), ("D AA G", "D AO G Z"), ("X Y",), ("A X C",)]
    scores = ErrorRate().score(predictions, references)
    # wrong words: 3 of 4; edits 0 + 1 + 2 + 2 over 3 + 3 + 2 + 3 symbols
    assert scores["word_error"] == pytest.approx(75)
    assert scores["symbol_error"] == pytest.approx(100 * 5 / 11)


def test_bleu_and_chrf_are_sacrebleu_s():
    predictions = ["The cat sat on the mat today", "a dog barks"]
    references = [("the cat sat on the mat", "A cat sat on a mat today"), ("a dog barked",)]
    columns = [["the cat sat on the mat", "a dog barked"], ["A cat sat on a mat today", None]]
    assert BLEU(lowercase=True).score(predictions, references) == {
        "bleu": sacrebleu.corpus_bleu(predictions, columns, lowercase=True).score
    }
    assert BLEU().score(predictions, references)["bleu"] < BLEU(lowercase=True).score(predictions, references)["bleu"]
    assert ChrF().score(predictions, references)["chrf"] == sacrebleu.corpus_chrf(predictions, columns).score
