"""Metrics by hand, and against the library called directly."""

import pytest
import sacrebleu

from qkv.decode import Greedy
from qkv.spec import edit
from qkv.train import BLEU, ChrF, ErrorRate
from qkv.train.evaluation import predictions, score
from qkv.use import Prediction
from tests.train.small import recipe


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


def test_lines_of_one_source_are_alternatives_of_words_and_lines_of_bleu(tmp_path):
    (tmp_path / "test.tsv").write_text("word\tback\na b c d\tx y z w\ne f g h\tp q r s\na b c d\tx y z v\n")
    targets = ["x y z w", "p q r s", "x y z v"]

    class Stub:
        def predict(self, texts, search, batch):
            return [[Prediction("x y z w" if text[0] == "a" else "p q r t", 0.0, [])] for text in texts]

    made = recipe(tmp_path)
    for metric, wanted in ((ErrorRate(), 2), (BLEU(), 3)):
        samples = predictions(Stub(), edit(made, "evaluation.metric", metric), "test.tsv", tmp_path, Greedy(), None)
        assert len(samples) == wanted
    found = score(BLEU(), samples)["bleu"]
    lines = [sample.prediction.text for sample in samples]
    assert sorted(sample.references[0] for sample in samples) == sorted(targets)
    assert found == sacrebleu.BLEU().corpus_score(lines, [[sample.references[0] for sample in samples]]).score
