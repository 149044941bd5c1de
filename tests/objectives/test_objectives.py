"""Objectives: the loss against torch's on each row alone, gradients of parts against the whole, and what is hidden."""

import dataclasses as dc

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qkv.data import Batch
from qkv.errors import QkvError
from qkv.masks import Full, Prefix
from qkv.models import Module
from qkv.objectives import Example, MaskedTokens, NextToken, Objective, Seq2Seq, Vocabulary
from qkv.parts import Learned
from qkv.spec import edit
from tests.contracts.specs import ROOM, VOCAB, decoder, pairs, rough

WORDS = Vocabulary(VOCAB, mask=3, specials=(0, 1, 2, 3))
LENGTHS, SOURCES = torch.tensor([9, 4, 7, 2, 9]), torch.tensor([3, 8, 8, 5, 1])
DECODER = decoder(at=Learned(ROOM))
ENCODER, PAIR = edit(DECODER, "mask", Full()), pairs()["transformer-tiny"]
CASES: dict[str, tuple[Objective, object]] = {
    "seq2seq": (Seq2Seq(label_smoothing=0.1), PAIR),
    "next-token": (NextToken(label_smoothing=0.1), DECODER),
    "masked": (MaskedTokens(share=0.4), ENCODER),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: slice = slice(None), padding: int = 0) -> Batch:
    """Five pairs, or some of them, cut to their longest; `padding` changes what stands in the padding."""
    draw = seeded(3)

    def packed(lengths: Tensor) -> Tensor:
        ids = torch.randint(4, VOCAB, (5, int(LENGTHS.max())), generator=draw)
        size = int(lengths[rows].max())
        real = torch.arange(size) < lengths[rows, None]
        return torch.where(real, ids[rows, :size], torch.randint(VOCAB, real.shape, generator=seeded(padding)))

    return Batch(packed(SOURCES), SOURCES[rows], packed(LENGTHS), LENGTHS[rows], torch.arange(5)[rows])


def learned(model: Module, objective: Objective, examples: list[Example]) -> dict[str, Tensor]:
    """The gradient of the loss per token over several examples."""
    tokens = sum(example.tokens for example in examples)
    model.zero_grad()
    for example in examples:
        (objective.loss(model, example) / tokens).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rows_of(example: Example, rows: slice) -> Example:
    """Some rows of an example: what is masked is drawn for the whole batch, so that it is cut afterwards."""
    counts = example.chosen.sum(1).tolist()
    labels = torch.cat(example.labels.split(counts)[rows])
    lengths = None if example.lengths is None else example.lengths[rows]
    return dc.replace(example, inputs=example.inputs[rows], chosen=example.chosen[rows], labels=labels, lengths=lengths)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cuts", [[2, 3], [1, 1, 1, 1, 1]], ids=str)
def test_parts_of_a_batch_teach_what_the_whole_teaches(name, cuts):
    (objective, spec), ends = CASES[name], torch.tensor(cuts).cumsum(0).tolist()
    model, parts = rough(spec), [slice(end - n, end) for n, end in zip(cuts, ends, strict=True)]
    whole = objective.example(batch(), WORDS, seeded())
    if name == "masked":
        examples = [rows_of(whole, part) for part in parts]
    else:
        examples = [objective.example(batch(part), WORDS, seeded()) for part in parts]
    expected, found = learned(model, objective, [whole]), learned(model, objective, examples)
    assert sum(example.tokens for example in examples) == whole.tokens
    assert found.keys() == expected.keys() == {key for key, _ in model.named_parameters()}
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("smooth", [True, False])
def test_the_loss_is_torchs_on_each_row_alone(name, smooth):
    objective, spec = CASES[name]
    model, given = rough(spec), batch()
    example = objective.example(given, WORDS, seeded())
    smoothing, total, at = getattr(objective, "label_smoothing", 0.0) if smooth else 0.0, torch.zeros(()).double(), 0
    for row, n in enumerate(LENGTHS.tolist()):
        ids = given.target[row : row + 1, :n]
        if name == "masked":
            places = example.chosen[row, :n]
            logits, labels = model(example.inputs[row : row + 1, :n])[0, places], ids[0, places]
        else:
            memory = model.encode(given.source[row : row + 1, : SOURCES[row]]) if name == "seq2seq" else {}
            logits, labels = model(ids[:, :-1], **memory)[0], ids[0, 1:]
        assert torch.equal(example.labels[at : at + len(labels)], labels)
        total += F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        at += len(labels)
    assert example.tokens == at
    torch.testing.assert_close(objective.loss(model, example, smooth=smooth), total)
    if name != "masked":
        assert example.tokens == given.tokens


@pytest.mark.parametrize("name", CASES)
def test_padding_teaches_nothing(name):
    objective, spec = CASES[name]
    model, found = rough(spec), []
    for padding in (0, 1):
        example = objective.example(batch(padding=padding), WORDS, seeded())
        found.append([example.labels, objective.loss(model, example), *learned(model, objective, [example]).values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(batch().target, batch(padding=1).target)


def test_full_rows_need_no_lengths():
    for name, (objective, _) in CASES.items():
        full = dc.replace(batch(slice(0, 1)), source_lengths=torch.tensor([3]))
        example = objective.example(full, WORDS, seeded())
        assert example.lengths is None and example.source_lengths is None, name


# --- masked tokens ---


def drawn(objective: MaskedTokens, vocabulary: Vocabulary = WORDS, seed: int = 0) -> tuple[Batch, Example]:
    ids = torch.randint(vocabulary.size, (256, 200), generator=seeded(1))
    given = Batch(None, None, ids, torch.randint(150, 201, (256,), generator=seeded(2)), torch.arange(256))
    return given, objective.example(given, vocabulary, seeded(seed))


def close(found: Tensor, share: float) -> bool:
    """Whether booleans are true as often as that, within five standard deviations."""
    return abs(float(found.double().mean()) - share) < 5 * (share * (1 - share) / found.numel()) ** 0.5


@pytest.mark.parametrize("objective", [MaskedTokens(), MaskedTokens(share=0.5, hide=0.3, swap=0.6)], ids=str)
def test_the_share_and_the_three_fates(objective):
    given, example = drawn(objective)
    real = (torch.arange(200) < given.target_lengths[:, None]) & (given.target > 3)
    assert not example.chosen[~real].any()
    assert close(example.chosen[real], objective.share)
    assert torch.equal(example.labels, given.target[example.chosen])
    assert torch.equal(example.inputs[~example.chosen], given.target[~example.chosen])
    shown, ordinary = example.inputs[example.chosen], VOCAB - 4
    assert close(shown == WORDS.mask, objective.hide)
    assert close((shown != WORDS.mask) & (shown != example.labels), objective.swap * (1 - 1 / ordinary))
    swapped = shown[(shown != WORDS.mask) & (shown != example.labels)]
    assert set(swapped.tolist()) == set(range(4, VOCAB))


def test_the_generator_alone_decides():
    torch.manual_seed(0)
    one = drawn(MaskedTokens())[1]
    torch.manual_seed(1)
    other, third = drawn(MaskedTokens())[1], drawn(MaskedTokens(), seed=1)[1]
    assert torch.equal(one.inputs, other.inputs) and torch.equal(one.chosen, other.chosen)
    assert not torch.equal(one.chosen, third.chosen)


def test_specials_may_have_any_ids():
    vocabulary = Vocabulary(VOCAB, mask=9, specials=(0, 7, 9, 22))
    given, example = drawn(MaskedTokens(share=1.0, hide=0.0, swap=1.0), vocabulary)
    ordinary = set(range(VOCAB)) - set(vocabulary.specials)
    assert set(given.target[example.chosen].tolist()) == ordinary
    assert set(example.inputs[example.chosen].tolist()) == ordinary


@pytest.mark.parametrize(("ids", "chosen"), [((1, 8, 2, 9), [1]), ((1, 2, 9), [])], ids=["short", "specials only"])
def test_a_batch_too_short_to_draw_from_teaches_its_one_token(ids, chosen):
    given = Batch(None, None, torch.tensor([ids]), torch.tensor([len(ids) - 1]), torch.tensor([0]))
    example = MaskedTokens(share=1e-6).example(given, WORDS, seeded())  # the last id is padding
    assert example.chosen[0].nonzero().flatten().tolist() == chosen


@pytest.mark.parametrize(
    "options", [{"share": 0.0}, {"share": 1.1}, {"hide": 0.8, "swap": 0.3}, {"hide": -0.1}], ids=str
)
def test_shares_are_shares(options):
    with pytest.raises(QkvError, match=r"share lies in \(0, 1\]"):
        MaskedTokens(**options)


# --- what cannot be ---


@pytest.mark.parametrize(
    ("objective", "model", "words"),
    [
        (Seq2Seq(), DECODER, "needs an encoder-decoder"),
        (NextToken(), PAIR, "needs a decoder"),
        (NextToken(), ENCODER, "needs a decoder"),
        (NextToken(), edit(DECODER, "mask", DECODER.mask | Prefix()), "needs a decoder"),
        (MaskedTokens(), DECODER, "need an encoder"),
        (MaskedTokens(), PAIR, "need an encoder"),
        (NextToken(), edit(DECODER, "head", None), "head"),
        (MaskedTokens(), edit(ENCODER, "head", None), "head"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_learn_it_is_refused(objective, model, words):
    with pytest.raises(QkvError, match=words):
        objective.refuse(model)


def test_a_model_that_can_is_not():
    for objective, model in CASES.values():
        objective.refuse(model)


def test_pairs_need_a_source():
    with pytest.raises(QkvError, match="learns from pairs"):
        Seq2Seq().example(dc.replace(batch(), source=None, source_lengths=None), WORDS, seeded())
