"""Synthetic tasks: what is drawn keeps the rules that it is described with."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from qkv.data import AssociativeRecall, Data, EvaluationBatches, Symbols, TrainingBatches, read, train_tokenizers
from qkv.data.synthetic import TOGETHER, chosen
from qkv.errors import QkvError
from qkv.spec import dump, load

TASK = AssociativeRecall(300, pairs=5, length=40, keys=9, values=7)


def test_every_key_is_asked_once_and_answered_with_its_value():
    for words in map(str.split, TASK.texts()):
        said = dict(zip(words[:10:2], words[1:10:2], strict=True))
        assert len(words) == 40 and len(said) == len(set(said.values())) == 5
        asked = [i for i in range(10, 40) if words[i][0] == "k"]
        assert sorted(words[i] for i in asked) == sorted(said)
        assert all(words[i + 1] == said[words[i]] for i in asked)
        noise = [word for word in words if word[0] == "n"]
        assert len(noise) == len(set(noise)) == 40 - 4 * 5
        again = [pair for pair, times in Counter(pairwise(words)).items() if times > 1]
        assert sorted(again) == sorted(said.items())  # and nothing else is repeated


def test_examples_are_the_same_each_time_and_a_longer_set_begins_with_them():
    assert list(TASK.texts()) == list(TASK.texts())
    few, many = AssociativeRecall(TOGETHER - 1), AssociativeRecall(TOGETHER + 3)
    texts = list(many.texts())
    assert texts[: TOGETHER - 1] == list(few.texts()) and len(set(texts)) == TOGETHER + 3
    assert list(AssociativeRecall(5, seed=1).texts()) != texts[:5]


def test_several_numbers_of_pairs_come_in_turn():
    mixed = AssociativeRecall(2 * TOGETHER + 20, pairs=(2, 5), length=40)
    asked = [sum(word[0] == "k" for word in text.split()) // 2 for text in mixed.texts()]
    assert asked == [2] * TOGETHER + [5] * TOGETHER + [2] * 20
    assert list(mixed.texts())[:TOGETHER] == list(AssociativeRecall(TOGETHER, pairs=2, length=40).texts())


def test_places_are_drawn_by_the_power_law():
    weights = np.arange(1, 9) ** (0.01 - 1)
    first = np.concatenate([chosen(np.random.default_rng(seed), weights, 3)[:, 0] for seed in range(200)])
    counts = np.bincount(first, minlength=8) / len(first)
    np.testing.assert_allclose(counts, weights / weights.sum(), atol=0.015)


def test_each_row_of_a_batch_is_one_example():
    data = load({"train": dump(TASK), "text": "text", "tokenizer": {"kind": "symbols"}, "context": 42}, Data)
    assert data == Data(TASK, text="text", tokenizer=Symbols(), context=42)
    tokenizers = train_tokenizers(data)
    tokenizer = tokenizers.target
    rows = []
    for batch in EvaluationBatches(data, TASK, tokenizers, 420):
        for ids in batch.target.tolist():
            assert ids[0] == tokenizer.begin and ids[41] == tokenizer.end
            rows.append(tokenizer.decode(ids[1:41]))
    assert sorted(rows) == sorted(TASK.texts())
    assert next(TrainingBatches(data, tokenizers, 420)).target.shape == (10, 43)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pairs": 0}, "1 pair at least"),
        ({"pairs": ()}, "1 pair at least"),
        ({"pairs": (4, 0)}, "1 pair at least"),
        ({"pairs": (4, 17)}, "17 different pairs need as many keys and values, not 16"),
        ({"pairs": (13, 4)}, "13 pairs need a length of 65"),
        ({"keys": 7}, "8 different pairs need as many keys"),
        ({"length": 39}, "8 pairs need a length of 40"),
        ({"examples": 0}, "1 example at least"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, words):
    with pytest.raises(QkvError, match=words):
        AssociativeRecall(**{"examples": 10, **settings})


def test_it_has_one_column():
    with pytest.raises(QkvError, match="associative-recall gives running text; name the column text"):
        list(read(TASK, ("source", "target")))
