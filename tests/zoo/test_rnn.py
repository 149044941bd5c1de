"""The encoder-decoder of 2014: one spec, which learns, and is decoded with a cache."""

import pytest
import torch

from qkv.decode import Beam, Greedy, Search, decode
from qkv.spec import edit
from qkv.train import Trainer
from qkv.zoo import spec_of
from tests.contracts.specs import pairs, rough
from tests.train.small import small_run


def test_the_papers_sizes():
    """GRUs of three matrices each for input and state, with two biases, and a product back to the words' width."""
    words, C, H = 100, 620, 1000
    gru = 3 * H * (C + H + 2) + H * C
    model = edit(spec_of("rnn-search"), "**.vocab", words).build()
    assert model.count() == 2 * words * C + 3 * gru + 4 * C * H + H


def test_it_learns(tmp_path):
    run = small_run(tmp_path, "model.preset=rnn-search-tiny", "train.steps=60", "optimizer.lr=0.02")
    Trainer(run).train()
    losses = [line["loss"] for line in run.metrics() if line["split"] == "train"]
    assert losses[-1] < losses[0] - 0.5


@torch.no_grad()
@pytest.mark.parametrize("search", [Greedy(), Beam(size=3, n_best=3)], ids=str)
def test_it_decodes_with_a_cache_as_without(search: Search):
    model, source = rough(pairs()["rnn-search-tiny"]), torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    memory = model.encode(source, lengths=torch.tensor([5, 3]))
    for row, found in enumerate(decode(model, [[1], [1]], search, limits=[6, 6], ends=2, memory=memory)):
        alone = model.encode(source[row : row + 1, : (5, 3)[row]])
        for one in found:
            ids = torch.tensor([[1, *one.ids, *([2] if one.ended else [])]])
            log_p = model(ids[:, :-1], **alone).log_softmax(-1)[0, range(ids.shape[1] - 1), ids[0, 1:]]
            assert one.log_p == pytest.approx(float(log_p.sum()), abs=1e-4)
        if isinstance(search, Greedy):
            best, text = found[0], [1]
            while len(text) <= 6 and text[-1] != 2:
                text.append(int(model(torch.tensor([text]), **alone)[0, -1].argmax()))
            assert [token for token in text[1:] if token != 2] == best.ids
