"""Training: exact accumulation, exact resume, and what happens when it is stopped or goes wrong."""

import errno
import os
import signal
import sys

import pytest
import torch

from qkv.checkpoints import weights
from qkv.errors import QkvError
from qkv.objectives import Seq2Seq
from qkv.recipes import find
from qkv.train import Run, Stopped, Trainer, load_recipe, start
from tests.train.small import small_run


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_it_learns(tmp_path):
    run = small_run(tmp_path, "train.steps=150", "train.evaluate_every=150", "train.tokens_per_batch=512")
    Trainer(run).train()
    losses = [line["loss"] for line in run.metrics() if line["split"] == "train"]
    assert losses[-1] < losses[0] - 0.5
    valid = [line for line in run.metrics() if line["split"] == "valid"]
    assert valid[-1]["loss"] < 1.3 and valid[-1]["word_error"] < 100


@pytest.mark.parametrize("settings", [(), ("train.recompute=true",), ("train.precision=bf16",)], ids=str)
def test_a_run_that_was_killed_continues_bit_for_bit(tmp_path, settings):
    straight = Trainer(small_run(tmp_path, *settings, name="straight"))
    straight.train()
    run = small_run(tmp_path, *settings, name="killed")
    killed = Trainer(run)
    killed.learn = dying_after(killed, 7)
    with pytest.raises(SystemError):
        killed.train()
    assert Run(run.folder).last == "step-00000006"
    resumed = Trainer(Run(run.folder))
    assert resumed.step == 6
    resumed.train()
    assert_same(weights_of(resumed), weights_of(straight))
    a, b = (Run(tmp_path / name) for name in ("straight", "killed"))
    assert_same(a.moment().tensors, b.moment().tensors)
    assert a.moment().values | {"seconds": 0} == b.moment().values | {"seconds": 0}
    timed = ("seconds", "tokens_per_second")
    told = [[{k: v for k, v in line.items() if k not in timed} for line in run.metrics()] for run in (a, b)]
    assert told[0] == told[1]


def dying_after(trainer: Trainer, steps: int):
    learn = trainer.learn

    def once(examples):
        if trainer.step == steps:
            raise SystemError
        return learn(examples)

    return once


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    class Joined:
        """One batch made of several."""

        def __init__(self, examples):
            self.examples, self.tokens = examples, sum(example.tokens for example in examples)

        def to(self, device):
            return self

    class Summed(Seq2Seq):
        def loss(self, model, example, *, smooth=True):
            return sum(super(Summed, self).loss(model, part, smooth=smooth) for part in example.examples)

    trainers = [Trainer(small_run(tmp_path, "**.dropout=0.0", name=name)) for name in "ab"]
    for trainer in trainers:
        trainer.model.double()
    examples = [trainers[0].examples.next() for _ in range(3)]
    assert len({example.tokens for example in examples}) > 1  # a plain mean of means would be wrong
    trainers[0].learn(examples)
    object.__setattr__(trainers[1].recipe, "objective", Summed(label_smoothing=0.1))
    trainers[1].learn([Joined(examples)])
    for name, tensor in weights_of(trainers[0]).items():
        torch.testing.assert_close(tensor, weights_of(trainers[1])[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_tells_how_to_go_on(tmp_path, number, code):
    straight = Trainer(small_run(tmp_path, name="straight"))
    straight.train()
    run = small_run(tmp_path, name="stopped")
    trainer = Trainer(run)
    learn = trainer.learn

    def interrupted(examples):
        if trainer.step == 4:
            os.kill(os.getpid(), number)
        return learn(examples)

    trainer.learn = interrupted
    with pytest.raises(Stopped, match=rf"stopped at step 5 of 12 and saved; .* --resume {run.folder}") as stopped:
        trainer.train()
    assert stopped.value.code == code
    resumed = Trainer(Run(run.folder))
    assert resumed.step == 5
    resumed.train()
    assert_same(weights_of(resumed), weights_of(straight))


def test_a_time_limit_stops_in_the_same_way(tmp_path):
    with pytest.raises(Stopped) as stopped:
        Trainer(small_run(tmp_path, "train.minutes=0.0")).train()
    assert stopped.value.code == 0


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(tmp_path):
    run = small_run(tmp_path)
    trainer = Trainer(run)
    learn = trainer.learn

    def poisoned(examples):
        if trainer.step == 5:
            with torch.no_grad():
                trainer.model.source.tokens.weight[5:] = float("inf")
        return learn(examples)

    trainer.learn = poisoned
    with pytest.raises(QkvError, match=r"stopped being a number at step 6: lower optimizer.lr .*step-00000004"):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in Run(run.folder).model(last=True).state_dict().values())


def test_an_evaluation_that_is_no_number_is_told(tmp_path):
    trainer = Trainer(small_run(tmp_path))
    trainer.step = 6
    with torch.no_grad():
        trainer.model.source.tokens.weight.fill_(float("nan"))
    with pytest.raises(QkvError, match=r"evaluation of valid.tsv gave .*nan"):
        trainer.judge(None, None)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = small_run(tmp_path)
    trainer = Trainer(run)
    save = weights.save_file

    def full(tensors, path, metadata=None):
        if trainer.step >= 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(QkvError, match=r"could not be written \(No space left on device\)"):
        trainer.train()
    assert sorted(path.name for path in run.folder.glob("*step*")) == ["step-00000004"]
    monkeypatch.undo()
    resumed = Trainer(Run(run.folder))
    assert resumed.step == 4
    resumed.train()
    straight = Trainer(small_run(tmp_path, name="straight"))
    straight.train()
    assert_same(weights_of(resumed), weights_of(straight))


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    run = small_run(tmp_path, "train.steps=8", "train.evaluate_every=2", "train.save_every=2")
    trainer = Trainer(run)
    scores = iter([50.0, 40.0, 60.0, 70.0])
    trainer.judge = judge_with(trainer, scores)
    trainer.train()
    opened = Run(run.folder)
    assert (opened.best, opened.last) == ("step-00000004", "step-00000008")
    assert sorted(path.name for path in run.folder.glob("step-*")) == ["step-00000004", "step-00000008"]


def judge_with(trainer: Trainer, scores):
    def judge(watch, board):
        value = next(scores)
        better = trainer.best is None or value < trainer.best
        trainer.best = value if better else trainer.best
        return better

    return judge


def test_patience_ends_a_run_early(tmp_path):
    settings = "train.evaluate_every=2", "train.save_every=100", "train.patience=2", "optimizer.lr=1e-12"
    run = small_run(tmp_path, *settings)
    Trainer(run).train()
    assert run.metrics()[-1]["step"] == 6
    assert Run(run.folder).last == "step-00000006"
    Trainer(Run(run.folder)).train()  # which has nothing to go on with
    assert Run(run.folder).last == "step-00000006" and run.metrics()[-1]["step"] == 6


def test_data_that_teaches_nothing_is_refused(tmp_path):
    (tmp_path / "once.txt").write_text(" ".join(f"w{n}" for n in range(300)))  # none can be recalled
    (tmp_path / "again.txt").write_text("a b c d " * 80)
    (tmp_path / "short.txt").write_text("a b c d")
    for train, valid, message in (("once", "again", "no training example has"), ("again", "short", "holds nothing")):
        settings = [f"data.train={train}.txt", f"data.valid={valid}.txt", "data.tokenizer={kind='word'}"]
        settings += ["train.steps=1", "train.tokens_per_batch=128", "model.width=8", "data.context=64"]
        run = start(load_recipe(find("recall"), settings), tmp_path / train, tmp_path)
        with pytest.raises(QkvError, match=message):
            Trainer(run).train()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_learns_what_fp32_learns(tmp_path, precision):
    run = small_run(tmp_path, "train.steps=60", "train.evaluate_every=60", f"train.precision={precision}")
    Trainer(run).train()
    assert [line for line in run.metrics() if line["split"] == "valid"][-1]["loss"] < 1.6


def test_examples_that_are_left_out_are_counted(tmp_path, capsys):
    run = small_run(tmp_path, "data.max_tokens=6", "train.steps=1")
    Trainer(run).train()
    words = (tmp_path / "train.tsv").read_text().splitlines()[1:]
    left = sum(len(line.split("\t")[0]) + 1 > 6 for line in words)
    assert left and f"{left} training examples are longer than max_tokens = 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.valid=nosuch.tsv", "nosuch.tsv does not exist"),
        ("evaluation.batch=0", "the batch of evaluation is a number above 0"),
        ("evaluation.examples=0", "the examples of evaluation is a number above 0"),
        ("optimizer.lr=nan", "expected a number, found nan"),
        ("optimizer.schedule.floor=5", "the floor of cosine is a share"),
    ],
)
def test_what_an_evaluation_would_stumble_over_is_found_before_training(tmp_path, setting, words):
    with pytest.raises(QkvError, match=words):
        small_run(tmp_path, setting)
    assert not (tmp_path / "run").exists()


def test_a_missing_library_of_a_metric_is_found_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(QkvError, match="pip install"):
        small_run(tmp_path)


def test_a_log_goes_on_where_a_run_was_stopped(tmp_path):
    whole = Trainer(small_run(tmp_path, "train.log_every=5", name="whole")).train().metrics()
    stopped = Trainer(small_run(tmp_path, "train.log_every=5"))
    learn, steps = stopped.learn, []

    def until(examples):
        if len(steps) == 9:
            raise KeyboardInterrupt
        steps.append(1)
        return learn(examples)

    stopped.learn = until
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    again = Trainer(Run(tmp_path / "run")).train().metrics()
    losses = [[(line["step"], line["loss"]) for line in lines if line["split"] == "train"] for lines in (whole, again)]
    assert losses[0] == losses[1]
