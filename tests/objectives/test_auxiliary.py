"""What experts add to a loss: against the transformers package's balance loss, and the papers' formulas by loops."""

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qkv.context import Tap
from qkv.errors import QkvError
from qkv.models import Module
from qkv.objectives import (
    Auxiliary,
    Balance,
    Importance,
    Load,
    MaskedTokens,
    NextToken,
    Objective,
    RouterZ,
    Seq2Seq,
    SequenceBalance,
)  # fmt: skip
from qkv.parts import Branch, Experts, LayerNorm, Learned, NoisyTopK, Router, TopK
from qkv.spec import dump, edit, load
from tests.contracts.specs import ROOM, decoder, pairs, rough
from tests.objectives.test_objectives import LENGTHS, WORDS, batch, learned, rows_of, seeded

E, K = 4, 2


def sparse(router: Router) -> Module:
    """Three layers with experts, in training mode, fp64."""
    spec = decoder(at=Learned(ROOM))
    return rough(edit(spec, "stack.*.ffn", Branch(Experts(8, count=E, router=router), pre=LayerNorm()))).train()


def example(rows: slice = slice(None)):
    return NextToken().example(batch(rows), WORDS, seeded())


def added(model: Module, term: Auxiliary, given=None) -> Tensor:
    """What a term adds to the loss of each token; the same noise each time."""
    given, losses = example() if given is None else given, []
    for objective in (NextToken(auxiliary=(term,)), NextToken()):
        torch.manual_seed(5)
        losses.append(objective.loss(model, given))
    return (losses[0] - losses[1]) / given.tokens


def seen(model: Module, given) -> tuple[dict[str, list[Tensor]], Tensor]:
    """By name what each layer emits, cut to its real tokens; and which those are."""
    tap, names = Tap("**.ffn.*"), ("router", "scores", "experts", "gates", "load")
    torch.manual_seed(5)
    model.hidden(given.inputs, lengths=given.lengths, tap=tap)
    return {name: list(tap.find(f"**.{name}").values()) for name in names}, given.chosen


@pytest.mark.parametrize("k", [1, K])
@pytest.mark.parametrize("rows", [slice(None), slice(0, 1)], ids=["ragged", "full"])
def test_balance_is_mixtral_s(k, rows):
    model, given = sparse(TopK(k)), example(rows)
    values, real = seen(model, given)
    logits = tuple(layer.flatten(0, 1) for layer in values["router"])
    expected = load_balancing_loss_func(logits, E, k, None if given.lengths is None else real)  # in fp32
    assert abs(float((added(model, Balance(0.5), given) - 0.5 * expected).detach())) < 1e-6


def test_balance_is_k_where_loads_are_even():
    found = added(sparse(NoisyTopK(E)), Balance(1.0))  # all are chosen, whatever the scores
    torch.testing.assert_close(found, torch.full_like(found, E))


def test_balance_teaches_the_scores_of_the_busy():
    """Its gradient is E f_e / T, of the scores, through the softmax: here by differences of the whole loss."""
    model, given = sparse(TopK(K)), example()
    weight = model.stack.layer(1).ffn.f.router.score.weight
    slope = torch.autograd.grad(added(model, Balance(1.0), given), weight)[0]
    for place in [(0, 3), (2, 7)]:
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
                values.append(added(model, Balance(1.0), given))
                weight[place] -= step
        assert abs(float((values[0] - values[1]) / 2e-5 - slope[place])) < 1e-5


def variation(sums: list[float]) -> float:
    mean = sum(sums) / len(sums)
    return sum((x - mean) ** 2 for x in sums) / len(sums) / mean**2


@pytest.mark.parametrize("term", [Importance(0.3), Load(0.3), RouterZ(0.3), SequenceBalance(0.3)], ids=str)
def test_the_others_are_their_formulas(term):
    model, given = sparse(NoisyTopK(K)), example()
    values, real = seen(model, given)
    layers = []
    for z, p, experts, gates, chance in zip(*values.values(), strict=True):
        places = real.nonzero().tolist()
        if isinstance(term, Importance):
            sums = [0.0] * E
            for b, t in places:
                for e, gate in zip(experts[b, t].tolist(), gates[b, t].tolist(), strict=True):
                    sums[e] += gate
            layers.append(variation(sums))
        elif isinstance(term, Load):
            layers.append(variation([sum(float(chance[b, t, e].detach()) for b, t in places) for e in range(E)]))
        elif isinstance(term, RouterZ):
            layers.append(sum(float(z[b, t].detach().exp().sum().log() ** 2) for b, t in places) / len(places))
        else:
            total = 0.0
            for b, n in enumerate((LENGTHS - 1).tolist()):
                f = [float((experts[b, :n] == e).sum()) / n for e in range(E)]
                total += n * E * sum(f[e] * float(p[b, :n, e].detach().mean()) for e in range(E))
            layers.append(total / len(places))
    assert abs(float(added(model, term).detach()) - 0.3 * sum(layers) / len(layers)) < 1e-9


@pytest.mark.parametrize("term", [SequenceBalance(0.1), RouterZ(0.1)], ids=str)
@pytest.mark.parametrize("cuts", [[2, 3], [1, 1, 1, 1, 1]], ids=str)
def test_parts_of_a_batch_teach_what_the_whole_teaches(term, cuts):
    model, objective, ends = sparse(TopK(K)), NextToken(auxiliary=(term,)), torch.tensor(cuts).cumsum(0).tolist()
    whole = example()
    parts = [rows_of(whole, slice(end - n, end)) for n, end in zip(cuts, ends, strict=True)]
    expected, found = learned(model, objective, [whole]), learned(model, objective, parts)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
    without = learned(model, NextToken(), [whole])
    router = "stack.1.ffn.f.router.score.weight"
    assert not torch.allclose(without[router], expected[router])


@pytest.mark.parametrize("router", [TopK(K), NoisyTopK(K)], ids=str)
def test_it_is_learned_through_checkpointing(router):
    terms = (Balance(0.1), Importance(0.1), RouterZ(0.1), *((Load(0.1),) if isinstance(router, NoisyTopK) else ()))
    model, objective, found = sparse(router), NextToken(auxiliary=terms), []
    for on in (False, True):
        torch.manual_seed(5)
        found.append(learned(model.recompute(on), objective, [example()]))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-9, atol=1e-12)


def test_padding_counts_nowhere():
    terms = (Balance(0.1), SequenceBalance(0.1), Importance(0.1), Load(0.1), RouterZ(0.1))
    model, objective, found = sparse(NoisyTopK(K)), NextToken(auxiliary=terms), []
    for padding in (0, 1):
        given = objective.example(batch(padding=padding), WORDS, seeded())
        torch.manual_seed(5)
        found.append([objective.loss(model, given), *learned(model, objective, [given]).values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_evaluation_knows_nothing_of_it():
    model = sparse(TopK(K))
    losses = [NextToken(auxiliary=terms).loss(model, example(), smooth=False) for terms in ((Balance(1.0),), ())]
    assert torch.equal(*losses)


def test_both_sides_of_a_pair_have_experts():
    pair = rough(edit(pairs()["transformer-tiny"], "**.ffn.f", Experts(8, count=E))).train()
    objective = Seq2Seq(auxiliary=(Balance(1.0),))
    given = objective.example(batch(), WORDS, seeded())
    tap = Tap("**.experts")
    memory = pair.encode(given.source, lengths=given.source_lengths, tap=tap)
    pair.hidden(given.inputs, lengths=given.lengths, tap=tap, **memory)
    assert {path.split(".")[0] for path in tap} == {"encoder", "decoder"}
    loss = objective.loss(pair, given) - Seq2Seq().loss(pair, given)
    assert 1.0 < float(loss.detach() / given.tokens) < E * 2


def test_recipes_name_terms_in_a_table():
    table = {"kind": "next-token", "auxiliary": [{"kind": "balance", "weight": 0.02}, {"kind": "router-z"}]}
    objective = load(table, Objective)
    assert objective == NextToken(auxiliary=(Balance(0.02), RouterZ(0.001)))
    assert dump(objective) == table
    assert MaskedTokens(auxiliary=(Balance(),)).auxiliary == (Balance(0.01),)


@pytest.mark.parametrize(
    ("term", "router", "words"),
    [
        (Balance(), None, "'balance' reads 'scores', and the model has no experts: leave it out"),
        (Load(), TopK(), "'load' reads 'load', and the router at stack.0.ffn emits none: leave it out"),
    ],
)
def test_a_model_without_it_is_refused(term, router, words):
    model = rough(decoder(at=Learned(ROOM))) if router is None else sparse(router)
    with pytest.raises(QkvError, match=words):
        NextToken(auxiliary=(term,)).loss(model, example())


def test_layers_with_other_numbers_of_experts_are_not_pooled():
    model = rough(edit(sparse(TopK()).spec, "stack.1.ffn.f.count", 3))
    with pytest.raises(QkvError, match="equally many experts; take sequence-balance"):
        added(model, Balance())
    assert added(model, SequenceBalance()) > 0
    with pytest.raises(QkvError, match="not negative"):
        Balance(weight=-1.0)
