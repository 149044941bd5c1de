"""Batches of a recipe's data as examples of its objective."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch

from qkv.data import EvaluationBatches, Files, Tokenizers, TrainingBatches
from qkv.errors import QkvError
from qkv.objectives import Example, Vocabulary
from qkv.train.recipe import Recipe


class Examples:
    """The examples of a recipe, without end for training and once for an evaluation."""

    def __init__(self, recipe: Recipe, tokenizers: Tokenizers, base: Path) -> None:
        self.recipe, self.tokenizers, self.base = recipe, tokenizers, base
        self.sets: dict[Files | float, EvaluationBatches] = {}
        self.generator = torch.Generator().manual_seed(recipe.train.seed)
        target = tokenizers.target
        specials = (target.pad, target.unknown, target.begin, target.end, target.mask)
        self.vocabulary = Vocabulary(target.size, target.mask, specials)

    @cached_property
    def training(self) -> TrainingBatches:
        """The shuffled batches of the training set; they know their position."""
        settings = self.recipe.train
        size = settings.tokens_per_batch
        return TrainingBatches(self.recipe.data, self.tokenizers, size, seed=settings.seed, base=self.base)

    def next(self) -> Example:
        """The next training example that teaches anything."""
        objective, epoch = self.recipe.objective, self.training.epoch
        while not (made := objective.example(next(self.training), self.vocabulary, self.generator)).tokens:
            if self.training.epoch > epoch + 1:  # a whole one has passed
                raise QkvError(f"no training example has anything that the objective {objective.kind!r} learns from")
        return made

    def evaluation(self, files: Files | float) -> Iterator[Example]:
        """Every example of a data set, once; what is random in them is the same each time."""
        generator, size = torch.Generator().manual_seed(0), self.recipe.train.tokens_per_batch
        if files not in self.sets:
            self.sets[files] = EvaluationBatches(self.recipe.data, files, self.tokenizers, size, base=self.base)
        for batch in self.sets[files]:
            yield self.recipe.objective.example(batch, self.vocabulary, generator)
