"""Tasks whose texts are drawn by a rule, to see what a model can learn at all."""

from collections.abc import Iterator
from itertools import cycle

import numpy as np

from qkv.data.files import Synthetic
from qkv.errors import QkvError
from qkv.spec import part

TOGETHER = 100  # examples that are drawn at once


@part("associative-recall")
class AssociativeRecall(Synthetic):
    """Multi-query associative recall (Arora 2023, Zoology): keys with their values, then each key again.

    k3 v7 k1 v2 … n5 n9 n2 k1 v2 n8 …: `pairs` different keys with different values, then in places of three words each
    key is asked once, which its value answers; all else is noise, no word of it twice. The n-th place is chosen in
    proportion to n^(power − 1), so that most keys are asked soon and some late. An example has `length` words, and the
    words that follow a key the second time are those that repeat a pair of words: what the objective `recall` learns.
    Given several numbers of `pairs`, each hundred examples have the next of them: of few pairs it is learned sooner.
    """

    examples: int
    pairs: int | tuple[int, ...] = 8
    length: int = 64
    keys: int = 16
    values: int = 16
    power: float = 0.01
    seed: int = 0

    def check(self) -> None:
        least, most = min(self.sizes, default=0), max(self.sizes, default=0)
        if least < 1 or self.examples < 1:
            raise QkvError(f"1 example at least has 1 pair at least; found {self.examples} of {self.pairs}")
        if most > min(self.keys, self.values):
            raise QkvError(f"{most} different pairs need as many keys and values, not {self.keys} and {self.values}")
        if self.length < 5 * most:
            raise QkvError(f"{most} pairs need a length of {5 * most}: each 2 words, and 3 to be asked")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of pairs, in turn."""
        return (self.pairs,) if isinstance(self.pairs, int) else self.pairs

    def texts(self) -> Iterator[str]:
        sizes = {"k": self.keys, "v": self.values, "n": self.length}
        words = [f"{letter}{number}" for letter, size in sizes.items() for number in range(size)]
        for first, pairs in zip(range(0, self.examples, TOGETHER), cycle(self.sizes), strict=False):
            drawn = self.draw(np.random.default_rng([self.seed, first]), pairs)
            for row in drawn[: self.examples - first].tolist():
                yield " ".join(words[i] for i in row)

    def draw(self, chance: np.random.Generator, pairs: int) -> np.ndarray:
        """TOGETHER × length numbers of words: keys, then values, then noise."""
        shared = 2 * pairs
        places = np.arange(1, (self.length - shared) // 3 + 1)
        keys, values = (chosen(chance, np.ones(n), pairs) for n in (self.keys, self.values))
        asked = shared + 3 * chosen(chance, places ** (self.power - 1), pairs)
        ids = self.keys + self.values + chosen(chance, np.ones(self.length), self.length)
        ids[:, :shared:2], ids[:, 1:shared:2] = keys, self.keys + values
        np.put_along_axis(ids, asked, keys, 1)
        np.put_along_axis(ids, asked + 1, self.keys + values, 1)
        return ids


def chosen(chance: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """TOGETHER × count different numbers, drawn one after another in proportion to their weights (Efraimidis 2006)."""
    waits = chance.exponential(size=(TOGETHER, len(weights))) / weights
    return waits.argsort(1)[:, :count]
