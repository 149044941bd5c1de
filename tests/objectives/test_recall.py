"""The objective of recall: only what has been said before in the row is learned."""

import dataclasses as dc

import torch

from qkv.data import Batch
from qkv.masks import Causal
from qkv.models import Sequence
from qkv.objectives import NextToken, Recall, Vocabulary
from qkv.objectives.recall import repeated
from qkv.parts import Attention, Block, Branch, Head, Stack, Tokens

VOCABULARY = Vocabulary(7, 4, (0, 1, 2, 3, 4))


def brute(row: list[int], t: int) -> bool:
    return any(row[j : j + 2] == row[t : t + 2] for j in range(t))


def test_repeated_pairs_are_those_that_a_search_finds():
    ids = torch.randint(5, (6, 40), generator=torch.Generator().manual_seed(0))
    expected = [[brute(row, t) for t in range(39)] for row in ids.tolist()]
    assert repeated(ids).tolist() == expected
    assert repeated(torch.arange(8).view(2, 4)).sum() == 0


def test_labels_are_the_repeated_tokens_and_padding_is_none():
    rows = torch.tensor([[5, 6, 5, 6, 0, 0], [6, 6, 6, 5, 5, 6]])
    lengths = torch.tensor([4, 6])
    example = Recall().example(Batch(None, None, rows, lengths, torch.arange(2)), VOCABULARY, torch.Generator())
    assert example.chosen.tolist() == [[False, False, True, False, False], [False, True, False, False, False]]
    assert example.labels.tolist() == [6, 6] and example.tokens == 2


def test_its_loss_is_that_of_the_next_token_at_these_places():
    torch.manual_seed(0)
    block = Block(attn=Branch(Attention(2)))
    model = Sequence(8, embed=Tokens(7), stack=Stack(block, depth=1), mask=Causal(), head=Head()).build()
    ids = torch.randint(5, 7, (3, 9))
    batch = Batch(None, None, ids, torch.tensor([9, 9, 9]), torch.arange(3))
    ours, whole = (kind().example(batch, VOCABULARY, torch.Generator()) for kind in (Recall, NextToken))
    apart = sum(
        NextToken().loss(model, dc.replace(whole, chosen=one, labels=ids[:, 1:][one]))
        for one in (torch.zeros_like(ours.chosen).index_put((r, c), torch.tensor(True)) for r, c in spots(ours.chosen))
    )
    assert 0 < ours.tokens < whole.tokens
    torch.testing.assert_close(Recall().loss(model, ours), apart)


def spots(chosen: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(row, column) for row, column in chosen.nonzero()]
