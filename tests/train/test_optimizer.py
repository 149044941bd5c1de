"""Schedules by their formulas, and which parameters decay."""

import math

import pytest
import torch

from qkv.parts import Mamba, PlainExperts, Rwkv6
from qkv.spec import kinds
from qkv.train import WSD, AdamW, Constant, Cosine, InverseSqrt, Schedule


def test_the_paper_s_schedule():
    """lr = C^−½ min(s^−½, s w^−3/2), at its peak C^−½ w^−½ (Vaswani 2017, equation 3)."""
    width, warmup = 512, 4000
    peak = width**-0.5 * warmup**-0.5
    for step in (1, 100, 3999, 4000, 4001, 100_000):
        paper = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert peak * InverseSqrt(warmup).factor(step, 100_000) == pytest.approx(paper)


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        (Constant(), 1, 1.0),
        (Constant(10), 5, 0.5),
        (Cosine(10, floor=0.2), 10, 1.0),
        (Cosine(10, floor=0.2), 55, 0.2 + 0.8 * (1 + math.cos(math.pi / 2)) / 2),
        (Cosine(10, floor=0.2), 100, 0.2),
        (WSD(10, decay=0.5), 30, 1.0),
        (WSD(10, decay=0.5), 75, 0.5),
        (WSD(10, decay=0.5, floor=0.1), 100, 0.1),
    ],
)
def test_schedules(schedule, step, factor):
    assert schedule.factor(step, 100) == pytest.approx(factor)


def test_every_schedule_stays_between_nothing_and_the_peak():
    from qkv.spec import KINDS

    for kind in kinds(Schedule):
        schedule = KINDS[kind]()
        assert all(0 <= schedule.factor(step, 50) <= 1 for step in range(1, 51)), kind


def test_what_only_looks_like_a_matrix_does_not_decay():
    model = torch.nn.ModuleList(part.build(8) for part in (Mamba(), Rwkv6(2), PlainExperts(hidden=3, count=4)))
    decayed, _ = AdamW(weight_decay=0.1).build(model).param_groups
    names = {name for name, parameter in model.named_parameters() for one in decayed["params"] if one is parameter}
    assert {"0.x.weight", "1.r.weight", "2.up"} <= names
    assert not names & {"0.A_log", "1.mix", "1.u", "2.up_bias", "2.down_bias"}


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, factor * before[name])
