"""Recipes, the loop that carries them out, and the runs that it leaves."""

from qkv.train.evaluation import Sample, Scores, evaluate
from qkv.train.loop import Stopped, Trainer, start
from qkv.train.metric import BLEU, ChrF, ErrorRate, Metric, ValidationLoss
from qkv.train.optimizer import WSD, AdamW, Constant, Cosine, InverseSqrt, Optimizer, Schedule
from qkv.train.recipe import Evaluation, Recipe, Train, load_recipe
from qkv.train.run import Run
from qkv.use import Prediction, Task

__all__ = [
    "BLEU",
    "WSD",
    "AdamW",
    "ChrF",
    "Constant",
    "Cosine",
    "ErrorRate",
    "Evaluation",
    "InverseSqrt",
    "Metric",
    "Optimizer",
    "Prediction",
    "Recipe",
    "Run",
    "Sample",
    "Schedule",
    "Scores",
    "Stopped",
    "Task",
    "Train",
    "Trainer",
    "ValidationLoss",
    "evaluate",
    "load_recipe",
    "start",
]
