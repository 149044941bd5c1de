"""Tasks whose texts are drawn by a rule, to see what a model can learn at all."""

from collections.abc import Iterator

import numpy as np

from qkv.data.files import Synthetic
from qkv.errors import QkvError
from qkv.spec import part

TOGETHER = 1000  # examples that are drawn at once


@part("associative-recall")
class AssociativeRecall(Synthetic):
    """Multi-query associative recall (Arora 2023, Zoology): keys with their values, then each key again.

    k3 v7 k1 v2 … n5 n9 n2 k1 v2 n8 …: `pairs` different keys with different values, then in places of three words each
    key is asked once, which its value answers; all else is noise, no word of it twice. The n-th place is chosen in
    proportion to n^(power − 1), so that most keys are asked soon and some late. An example has `length` words, and the
    words that follow a key the second time are those that repeat a pair of words: what the objective `recall` learns.
    """

    examples: int
    pairs: int = 8
    length: int = 64
    keys: int = 16
    values: int = 16
    power: float = 0.01
    seed: int = 0

    def check(self) -> None:
        if not 1 <= self.pairs <= min(self.keys, self.values) or self.examples < 1:
            raise QkvError(f"{self.pairs} different pairs need as many keys and values; there is 1 example at least")
        if self.length < 5 * self.pairs:
            raise QkvError(f"{self.pairs} pairs need a length of {5 * self.pairs}: each 2 words, and 3 to be asked")

    def texts(self) -> Iterator[str]:
        sizes = {"k": self.keys, "v": self.values, "n": self.length}
        words = [f"{letter}{number}" for letter, size in sizes.items() for number in range(size)]
        for first in range(0, self.examples, TOGETHER):
            drawn = self.draw(np.random.default_rng([self.seed, first]))
            for row in drawn[: self.examples - first].tolist():
                yield " ".join(words[i] for i in row)

    def draw(self, chance: np.random.Generator) -> np.ndarray:
        """TOGETHER × length numbers of words: keys, then values, then noise."""
        shared = 2 * self.pairs
        places = np.arange(1, (self.length - shared) // 3 + 1)
        keys, values = (chosen(chance, np.ones(n), self.pairs) for n in (self.keys, self.values))
        asked = shared + 3 * chosen(chance, places ** (self.power - 1), self.pairs)
        ids = self.keys + self.values + chosen(chance, np.ones(self.length), self.length)
        ids[:, :shared:2], ids[:, 1:shared:2] = keys, self.keys + values
        np.put_along_axis(ids, asked, keys, 1)
        np.put_along_axis(ids, asked + 1, self.keys + values, 1)
        return ids


def chosen(chance: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """TOGETHER × count different numbers, drawn one after another in proportion to their weights (Efraimidis 2006)."""
    waits = chance.exponential(size=(TOGETHER, len(weights))) / weights
    return waits.argsort(1)[:, :count]
