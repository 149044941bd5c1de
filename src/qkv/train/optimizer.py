"""Optimisers and learning-rate schedules."""

import math

import torch
from torch import nn

from qkv.errors import QkvError
from qkv.spec import Spec, part, positive


class Schedule(Spec):
    """The share of the peak learning rate at each step."""

    warmup: int = 0
    """Steps of linear warm-up, where a schedule has the field."""

    def check(self) -> None:
        if self.warmup < 0:
            raise QkvError(f"a warm-up takes 0 steps or more, not {self.warmup}")

    def factor(self, step: int, steps: int) -> float:
        """For step 1 … steps."""
        return 1.0


@part("constant")
class Constant(Schedule):
    """Linear warm-up, then the peak."""

    warmup: int = 0

    def factor(self, step: int, steps: int) -> float:
        return warm(step, self.warmup)


@part("inverse-sqrt")
class InverseSqrt(Schedule):
    """min(s / w, √(w / s)): the schedule of Vaswani 2017, whose peak is C^(−1/2) w^(−1/2)."""

    warmup: int = 4000

    def check(self) -> None:
        if self.warmup < 1:
            raise QkvError("inverse-sqrt needs a warm-up of at least 1 step")

    def factor(self, step: int, steps: int) -> float:
        return min(step / self.warmup, math.sqrt(self.warmup / step))


@part("cosine")
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `floor` at the last step (Loshchilov 2017)."""

    warmup: int = 0
    floor: float = 0.1

    def check(self) -> None:
        super().check()
        shares(self, "floor")

    def factor(self, step: int, steps: int) -> float:
        if step <= self.warmup:
            return warm(step, self.warmup)
        done = min(1.0, (step - self.warmup) / max(1, steps - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


@part("wsd")
class WSD(Schedule):
    """Warm-up, stable, decay: the peak until the last share `decay` of the steps, then down to `floor` (Hu 2024)."""

    warmup: int = 0
    decay: float = 0.2
    floor: float = 0.0

    def check(self) -> None:
        super().check()
        shares(self, "decay", "floor")

    def factor(self, step: int, steps: int) -> float:
        left = (steps - step) / max(1.0, self.decay * steps)
        return min(warm(step, self.warmup), self.floor + (1 - self.floor) * min(1.0, max(0.0, left)))


def shares(spec: Schedule, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(spec, name) <= 1:
            raise QkvError(f"the {name} of {spec.kind} is a share, from 0 to 1, not {getattr(spec, name)}")


def warm(step: int, warmup: int) -> float:
    return min(1.0, step / warmup) if warmup else 1.0


class Optimizer(Spec):
    """Builds torch's optimiser for a model; the loop sets lr × schedule before each step."""

    lr: float
    schedule: Schedule

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        raise AssertionError(f"{type(self).__name__} does not say what it builds")


@part("adamw")
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov 2019), on matrices only: norms and biases do not decay.

    Nor does what a module names as `undecayed`: matrices that are biases, or rates.
    """

    lr: float = 3e-4
    schedule: Schedule = Constant()
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9
    weight_decay: float = 0.0

    def check(self) -> None:
        positive(self, "lr")
        if not all(0 <= beta < 1 for beta in self.betas) or self.weight_decay < 0:
            raise QkvError("the betas lie in [0, 1), and weight_decay is not negative")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        spared = {getattr(module, name) for module in model.modules() for name in getattr(module, "undecayed", ())}
        decayed, others = list[nn.Parameter](), list[nn.Parameter]()
        for parameter in model.parameters():
            if parameter.requires_grad:
                (decayed if parameter.dim() >= 2 and parameter not in spared else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
