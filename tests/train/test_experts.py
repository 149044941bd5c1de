"""Training with experts: a run that was killed goes on bit for bit, and balances are updated once a step."""

import pytest
import torch

from qkv.errors import QkvError
from qkv.train import Run, Trainer
from tests.train.small import small_run
from tests.train.test_loop import assert_same, dying_after, weights_of

EXPERTS = (
    "model.**.ffn.f={kind='experts', hidden=16, count=4, capacity=1.0, router={kind='%s', k=2}}",
    "objective.auxiliary=[{kind='balance', weight=0.02}, {kind='router-z'}]",
)


def experts(router: str) -> tuple[str, str]:
    return EXPERTS[0] % router, EXPERTS[1]


def biases(trainer: Trainer) -> list[torch.Tensor]:
    return [value for name, value in trainer.model.named_buffers() if name.endswith("router.bias")]


@pytest.mark.parametrize(
    ("router", "settings"),
    [("noisy-top-k", ("train.recompute=true",)), ("biased-top-k", ()), ("biased-top-k", ("train.precision=bf16",))],
)
def test_a_run_that_was_killed_continues_bit_for_bit(tmp_path, router, settings):
    straight = Trainer(small_run(tmp_path, *experts(router), *settings, name="straight"))
    straight.train()
    killed = Trainer(run := small_run(tmp_path, *experts(router), *settings, name="killed"))
    killed.learn = dying_after(killed, 7)
    with pytest.raises(SystemError):
        killed.train()
    resumed = Trainer(Run(run.folder))
    resumed.train()
    assert_same(weights_of(resumed), weights_of(straight))
    assert len(biases(resumed)) == (2 if router == "biased-top-k" else 0)
    assert all(bias.any() for bias in biases(resumed))


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_the_bias_moves_once_a_step_by_the_load_of_all_its_batches(tmp_path, recompute):
    settings = (*experts("biased-top-k")[:1], "**.dropout=0.0", f"train.recompute={recompute}", "train.accumulate=3")
    trainer = Trainer(small_run(tmp_path, *settings))
    router = trainer.model.encoder.layer(0).ffn.f.router
    loads, count = [], type(router).count

    def counted(experts, valid):
        count(router, experts, valid)
        loads.append((experts if valid is None else experts[valid]).flatten().bincount(minlength=4))

    router.count = counted
    examples = [trainer.examples.next() for _ in range(3)]
    trainer.model.train()
    trainer.learn(examples)
    load = torch.stack(loads).sum(0).float()
    assert len(loads) == (3 if recompute == "false" else 6)
    torch.testing.assert_close(router.bias, 0.001 * (load.mean() - load).sign())


def test_a_term_without_experts_stops_at_the_first_step(tmp_path):
    trainer = Trainer(small_run(tmp_path, "objective.auxiliary=[{kind='balance'}]"))
    with pytest.raises(QkvError, match="the model has no experts"):
        trainer.train()
