"""The acceptance test of the design: a mixer, a position and a norm from outside train, decode, inspect and draw."""

import torch
from torch import Tensor, nn

import qkv
from qkv.look import attend, attention_grid
from qkv.parts import Body, Linear, Mixer, Norm, Position, Positional
from qkv.spec import part
from qkv.state import Recurrent
from qkv.train import Run, Task, Trainer
from tests.contracts.specs import rough
from tests.train.small import small_run


@part("test-leaky-sum")
class LeakySum(Mixer):
    """s_t = λ s_{t−1} + W x_t, λ learned per feature: the simplest recurrence."""

    leak: float = 0.5

    def build(self, width: int) -> Body:
        return _LeakySum(self, width)


class _LeakySum(Body):
    def __init__(self, spec: LeakySum, width: int) -> None:
        super().__init__()
        self.spec, self.write = spec, Linear(width, width)
        self.leak = nn.Parameter(torch.full((width,), spec.leak))

    def new_cell(self, batch, room, given):
        return Recurrent(sum=self.leak.new_zeros(batch, len(self.leak)))

    def forward(self, x, context, cell=None):
        now = cell.now["sum"] if cell is not None else x.new_zeros(len(x), x.shape[2])
        valid, kept = context.valid(), []
        for t, written in enumerate(self.write(x).unbind(1)):
            after = torch.sigmoid(self.leak) * now + written
            now = after if valid is None else torch.where(valid[:, t, None], after, now)
            kept.append(now)
        if cell is not None:
            cell.now = {"sum": now}
        return torch.stack(kept, 1)


@part("test-wave")
class Wave(Position):
    """Scores get a cos(ω (k − q)), ω learned per head."""

    def build(self, heads: int, head_width: int) -> Positional:
        return _Wave(self, heads)


class _Wave(Positional):
    def __init__(self, spec: Wave, heads: int) -> None:
        super().__init__(spec)
        self.rate = nn.Parameter(torch.rand(heads, 1, 1))

    def bias(self, queries, keys, context):
        return torch.cos((keys - queries)[:, None] * self.rate)


@part("test-largest")
class Largest(Norm):
    """x / max |x|, then a learned scale."""

    def build(self, width: int) -> nn.Module:
        return _Largest(width)


class _Largest(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, context=None) -> Tensor:
        return self.weight * x / x.abs().amax(-1, keepdim=True).clamp(min=1e-6)


FOREIGN = (
    'model.**.post={kind="test-largest"}',
    'model.decoder.*.attn.f={kind="test-leaky-sum", leak=0.3}',
    'model.encoder.*.attn.f.position={kind="test-wave"}',
)


def test_foreign_parts_live_everywhere(tmp_path):
    run = small_run(tmp_path, *FOREIGN, "train.steps=60", "train.evaluate_every=30")
    Trainer(run).train()
    losses = [line["loss"] for line in run.metrics() if line["split"] == "train"]
    assert losses[-1] < losses[0]

    run = Run(run.folder)  # its spec comes back from disk
    model = qkv.load(run.folder / run.best)
    assert str(qkv.load(run.folder).spec) == str(model.spec)
    assert model.spec == run.recipe.model and "LeakySum(leak=0.3)" in str(model.spec)

    task = Task(model, run.tokenizers)
    answers = [row[0] for row in task.predict(["abc", "edcba"], run.recipe.evaluation.search)]
    alone = task.predict(["abc"], run.recipe.evaluation.search)[0][0]
    assert answers[0].ids == alone.ids

    seen = qkv.inspect(model.spec, 16)
    assert seen.root.parameters == model.count() and "LeakySum" in str(seen) and "Largest" in str(seen)
    assert seen.root.cache_bytes > 0

    views = {view.kind: view for view in attend(task, "abc", answers[0])}
    assert {"encoder", "cross"} <= set(views)
    cross = views["cross"]
    picture = attention_grid(cross.weights, cross.rows, cross.columns, path=tmp_path / "cross.png")
    assert picture.stat().st_size > 1000


def test_a_foreign_memory_obeys_the_contract(tmp_path):
    model = rough(small_run(tmp_path, *FOREIGN).recipe.model)
    source, target = torch.randint(5, 10, (2, 6)), torch.randint(5, 10, (2, 9))
    with torch.no_grad():
        memory = model.encode(source)
        whole, state = model(target, **memory), model.new_state(2, 12, **memory)
        steps = [model(target[:, :4], state=state)]
        mark = state.mark()
        model(target[:, 4:7].flip(1), state=state)
        again = state.rewind(mark, keep=0)
        steps.append(model(target[:, 4 - again :], state=state))
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-9)
