"""Where heads drop: between what they take and the next layer, in training only. (Their values: tests/zoo.)"""

import pytest
import torch
from torch import Tensor, nn

from qkv.parts import Classifier, Output, Pool, Span, Tagger, Transform

C = 2
RELU = Transform("relu")
HEADS = {
    "pool": Classifier(("a", "b"), pool=Pool(transform=RELU, dropout=0.5)),
    "classifier": Classifier(("a", "b"), pool=Pool(transform=RELU), dropout=0.5),
    "tagger": Tagger(("a", "b"), transform=RELU, dropout=0.5),
    "span": Span(transform=RELU, dropout=0.5),
}


def identity(spec: Output) -> nn.Module:
    """The head with the unit matrix in every layer."""
    head = spec.build(C, torch.zeros(3, C))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.eye(C) if parameter.dim() == 2 else torch.zeros(C))
    return head


@pytest.mark.parametrize("name", HEADS)
def test_a_head_drops_in_training_only(name: str) -> None:
    torch.manual_seed(0)
    head, x = identity(HEADS[name]), torch.rand(400, 3, C) + 1

    def expected(kept: Tensor) -> Tensor:
        return kept[:, 0] if name in ("pool", "classifier") else kept

    torch.testing.assert_close(head.eval()(x, None), expected(x))
    found = head.train()(x, None)
    dropped = found == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(found[~dropped], 2 * expected(x)[~dropped])


def test_a_pool_drops_before_its_transform() -> None:
    torch.manual_seed(0)
    head = identity(Classifier(("a", "b"), pool=Pool(transform=Transform("sigmoid"), dropout=0.5))).train()
    assert head(torch.rand(50, 3, C) + 1, None).min() == 0.5  # σ(0)


@pytest.mark.parametrize("take", ["first", "last", "mean", "max"])
def test_a_text_without_tokens_has_a_vector_of_numbers(take: str) -> None:
    x, valid = torch.randn(2, 3, C), torch.tensor([[True, False, False], [False, False, False]])
    found = Pool(take).build(C)(x, valid)
    assert found.isfinite().all() and torch.equal(found[0], x[0, 0])


def test_a_span_reads_its_transform() -> None:
    head = identity(Span(transform=Transform("tanh", width=C)))
    x = torch.randn(4, 5, C)
    torch.testing.assert_close(head(x, None), x.tanh())
