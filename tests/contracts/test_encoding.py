"""Contract 2 for encoders: whatever mixes tokens, padding changes nothing, and what sees both sides keeps no cache."""

import pytest
import torch

from qkv.errors import QkvError
from qkv.masks import Causal
from qkv.models import Module
from qkv.spec import dump, edit, load
from tests.contracts.specs import VOCAB, encoders, rough

ENCODERS = encoders()
WHOLE = [name for name, spec in ENCODERS.items() if not spec.stack.blocks[0].branches["attn"].f.incremental]
CLOSE = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture(params=ENCODERS)
def model(request: pytest.FixtureRequest) -> Module:
    return rough(ENCODERS[request.param])


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_on_any_side_changes_nothing(model, ids, side):
    valid = torch.ones(3, 17, dtype=torch.bool)
    valid[1, {"left": slice(0, 5), "right": slice(12, 17), "between": slice(3, 8)}[side]] = False
    out = model(ids, valid=valid)
    torch.testing.assert_close(out[1:2, valid[1]], model(ids[1:2, valid[1]]), **CLOSE)
    torch.testing.assert_close(out[[0, 2]], model(ids[[0, 2]]), **CLOSE)
    other = torch.where(valid, ids, (ids + 5) % VOCAB)
    assert torch.equal(model(other, valid=valid)[valid], out[valid])
    valid[1] = False
    assert model(ids, valid=valid).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", WHOLE)
def test_what_sees_both_sides_sees_them_and_cannot_decode(name, ids):
    spec = ENCODERS[name]
    assert load(dump(spec)) == spec
    model, changed = rough(spec), ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % VOCAB
    assert (model(changed) - model(ids)).abs().amax((0, 2)).min() > 1e-6
    hidden = rough(edit(spec, "mask", Causal()))
    for refused in (lambda: hidden(ids), lambda: hidden.new_state(3, 17)):
        with pytest.raises(QkvError, match=r"sees tokens to come, .*: use the mask Full\(\)$"):
            refused()


def test_recomputed_gradients_are_the_gradients(model, ids):
    model.train()
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)  # dropout draws the same in both
        model.recompute(on).zero_grad()
        model(ids, lengths=torch.tensor([17, 9, 3])).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)
