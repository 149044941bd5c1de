"""Whoever proposes what, the text is the model's own: the same ids as a plain stream, or the same distribution."""

import itertools
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkv.decode import (
    AtLeast,
    Ban,
    Draft,
    ForceLast,
    Greedy,
    Lookup,
    NoRepeat,
    OneByOne,
    Proposer,
    RepetitionPenalty,
    Sample,
    Session,
    speculate,
    stream,
)
from qkv.decode.rules import Past
from qkv.decode.speculative import Choice, Proposal
from qkv.errors import QkvError
from qkv.models import Module
from qkv.models.model import Model
from qkv.native import fast
from qkv.ops.sample import Scores
from qkv.parts import Tokens
from qkv.state import State
from tests.contracts.specs import ROOM, VOCAB, decoder, decoders, pairs, rough

PAIRS = pairs()
EVERY: dict[str, Model] = {**decoders(), **PAIRS}
KINDS = [name for name in EVERY if not name.startswith(("norm", "gate", "score", "embedding"))]  # have cells alike
LIMIT, SHORT = 20, 12


def ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB), k=length)


@cache
def model(name: str, kind: str = "torch", seed: int = 0) -> Module:
    made = rough(EVERY[name], seed)
    return fast(made.float(), 1, say=lambda line: None) if kind == "native" else made


def near(name: str, kind: str = "torch") -> Module:
    """A model that mostly, and not always, says the same."""
    made = rough(EVERY[name])
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    return fast(made.float(), 1, say=lambda line: None) if kind == "native" else made


@torch.inference_mode()
def memory(made: Module) -> Any:
    return made.encode(torch.tensor([ids(7, 7)])) if hasattr(made, "encode") else None


class Knowing(Proposer):
    """Proposes as many as it likes of what comes, now and then wrong: any number of tokens may stand."""

    def __init__(self, answer: list[int], wrong: float = 0.25, ahead: int = 5, seed: int = 0) -> None:
        super().__init__(ahead)
        self.answer, self.wrong, self.draw = answer, wrong, random.Random(seed)
        self.stood: set[tuple[int, int]] = set()

    def propose(self, text: list[int], room: int, past: Past, choice: Choice) -> list[Proposal]:
        made = len(self.answer) - (room + 1 - len(text))
        most = self.draw.randint(0, self.most(text, room)) if self.wrong else self.most(text, room)
        coming = self.answer[made : made + most]
        wrong = [self.draw.random() < self.wrong for _ in coming]
        return [Proposal((token + bad) % VOCAB) for token, bad in zip(coming, wrong, strict=True)]

    def learn(self, proposed: int, accepted: int, tokens: int) -> None:
        super().learn(proposed, accepted, tokens)
        self.next = self.ahead
        self.stood.add((proposed, accepted))


# --- the ids of a plain stream ---


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("name", KINDS)
def test_greedy_ids_are_those_of_a_plain_stream(name, kind):
    """And what the session then holds is what it would have read step by step: to the bit, where the program is."""
    made = model(name, kind)
    prompt = [1] if name in PAIRS else ids(9)
    plain = Session(made, memory=memory(made))
    answer = list(stream(made, prompt, Greedy(), limit=SHORT, session=plain))
    seen = plain.feed([*prompt, *answer[:-1], 1]).x
    draft = near(name, kind)
    for proposer in (Knowing(answer, ahead=4), Draft(draft, memory=memory(draft))):
        session = Session(made, memory=memory(made))
        assert list(speculate(made, prompt, Greedy(), proposer, limit=SHORT, session=session)) == answer
        assert proposer.tokens == SHORT and 0 <= proposer.accepted <= proposer.proposed
        found = session.feed([*prompt, *answer[:-1], 1]).x
        if made.programs:
            assert torch.equal(found, seen)
        else:
            torch.testing.assert_close(found, seen, rtol=1e-5, atol=1e-5 * float(seen.abs().max()))


@pytest.mark.parametrize("kind", ["torch", "native"])
@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba", "mixer mamba2", "window in every other layer"])
def test_any_number_may_stand(name, kind):
    made, draft, stood = model(name, kind), Draft(near(name, kind)), set()
    for seed in range(6):
        prompt = ids(1 + 2 * seed, seed)
        answer = list(stream(made, prompt, Greedy(), limit=LIMIT))
        proposer = Knowing(answer, seed=seed, wrong=(0.1, 0.4)[seed % 2])
        assert list(speculate(made, prompt, Greedy(), proposer, limit=LIMIT)) == answer
        stood |= proposer.stood
        assert list(speculate(made, prompt, Greedy(), draft, limit=LIMIT)) == answer
    assert 0 < draft.accepted < draft.proposed
    assert {(3, 0), (3, 1), (3, 3)} <= stood and {(4, 4), (5, 5)} & stood


SEARCHES: dict[str, OneByOne] = {
    "sample": Sample(temperature=1.5, seed=3),
    "nucleus": Sample(top_p=0.8, rules=(RepetitionPenalty(1.3),)),
    "no repeat": Greedy(rules=(NoRepeat(2), AtLeast(3))),
    "penalty": Greedy(rules=(RepetitionPenalty(1.5), Ban(((2,), (3, 4))), ForceLast(5))),
}


@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba"])
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES.keys())
def test_rules_are_heeded_and_who_draws_nothing_changes_no_text(search, name):
    made = model(name)
    for seed in range(3):
        prompt = ids(6, seed)
        answer = list(stream(made, prompt, search, limit=LIMIT, ends=(0,), seed=seed))
        padded = [*answer, *[0] * (LIMIT - len(answer))]
        proposers = [Knowing(padded), Lookup(longest=2)]
        proposers += [Draft(near(name))] if isinstance(search, Greedy) else []
        for proposer in proposers:
            found = list(speculate(made, prompt, search, proposer, limit=LIMIT, ends=(0,), seed=seed))
            assert found == answer
        assert proposers[0].accepted


def test_drafts_and_models_may_be_of_any_kind():
    for name, other in itertools.permutations(["mixer attention", "mixer mamba", "window in every other layer"], 2):
        made, prompt = model(name), ids(5)
        answer = list(stream(made, prompt, Greedy(), limit=LIMIT))
        draft = Draft(model(other, seed=1), ahead=3)
        assert list(speculate(made, prompt, Greedy(), draft, limit=LIMIT)) == answer
        again = Draft(model(name))
        assert list(speculate(made, prompt, Greedy(), again, limit=LIMIT)) == answer
        assert again.accepted == again.proposed and again.passes < LIMIT / 3


def test_a_run_that_stands_ends_at_the_end_and_at_the_limit():
    made, prompt = model("mixer attention"), ids(5)
    answer = list(stream(made, prompt, Greedy(), limit=LIMIT))
    for limit in range(LIMIT + 1):
        proposer = Knowing(answer[:limit], wrong=0.0)
        assert list(speculate(made, prompt, Greedy(), proposer, limit=limit)) == answer[:limit]
        assert proposer.accepted == proposer.proposed == max(0, limit - proposer.passes)
    for end in set(answer):
        proposer = Knowing(answer, wrong=0.0)
        found = list(speculate(made, prompt, Greedy(), proposer, limit=LIMIT, ends={end}))
        assert found == answer[: answer.index(end)] and proposer.tokens == len(found)


def test_all_positions_can_be_used_and_a_draft_may_have_fewer():
    made, short = model("embedding learned"), rough(decoder(at=EVERY["embedding learned"].embed.position))
    prompt = ids(30)
    answer = list(stream(made, prompt, Greedy(), limit=11))  # 40 are read, the eleventh is written
    assert list(speculate(made, prompt, Greedy(), Knowing(answer, wrong=0.0), limit=11)) == answer
    endless = model("position rotary")
    answer = list(stream(endless, prompt, Greedy(), limit=30))
    draft = Draft(short)
    assert list(speculate(endless, prompt, Greedy(), draft, limit=30)) == answer
    assert draft.proposed > 0 and len(draft.session.ids) < ROOM


# --- sessions ---


@pytest.mark.parametrize("name", ["mixer attention", "mixer mamba"])
def test_streams_may_take_turns_with_one_session_and_stop_anywhere(name):
    made = model(name)
    prompts = [ids(6), [*ids(4), 1, 2, 3], ids(9, 1)]
    wanted = [list(stream(made, prompt, Greedy(), limit=12)) for prompt in prompts]
    session = Session(made)
    running = [
        speculate(made, prompts[0], Greedy(), Knowing(wanted[0]), limit=12, session=session),
        stream(made, prompts[1], Greedy(), limit=12, session=session),
        speculate(made, prompts[2], Greedy(), Knowing(wanted[2]), limit=12, session=session),
    ]
    assert [list(row) for row in zip(*zip(*running, strict=True), strict=True)] == wanted
    for count in range(1, 12):
        some = speculate(made, prompts[0], Greedy(), Knowing(wanted[0], wrong=0.0), limit=12, session=session)
        assert list(itertools.islice(some, count)) == wanted[0][:count]
        some.close()
        longer = [*prompts[0], *wanted[0][:count], 3]
        assert list(stream(made, longer, Greedy(), limit=3, session=session)) == list(
            stream(made, longer, Greedy(), limit=3)
        )


def test_a_recurrence_reads_little_again(monkeypatch):
    """A pass that fails is read again in the next one, or, if that is much, in one of its own; never from the start."""
    made = model("mixer mamba")
    prompt = ids(15)
    answer = list(stream(made, prompt, Greedy(), limit=LIMIT))
    fed, inner = [], made.hidden
    monkeypatch.setattr(made, "hidden", lambda text, **given: fed.append(text.shape[1]) or inner(text, **given))
    proposer = Knowing(answer, wrong=0.3, ahead=3)
    assert list(speculate(made, prompt, Greedy(), proposer, limit=LIMIT)) == answer
    assert proposer.accepted < proposer.proposed
    assert fed[0] == 15 and max(fed[1:]) <= 6 and len(fed) < 2 * proposer.passes
    assert sum(fed[1:]) <= 2 * (LIMIT + proposer.proposed)


def test_a_session_goes_back_no_further_than_it_must(monkeypatch):
    made, text = model("mixer mamba"), ids(20)
    session, fed, inner = Session(made), [], made.hidden
    monkeypatch.setattr(made, "hidden", lambda text, **given: fed.append(text.shape[1]) or inner(text, **given))
    session.feed(text[:10], room=30)
    session.more(text[10:13])
    session.feed([*text[:11], 1])  # read again from where the first text ended
    session.feed([*text[:9], 2])  # from the beginning: the mark is behind the change
    session.feed([*text[:10], 3])
    assert fed == [10, 3, 2, 10, 11]
    fed.clear()
    scores = session.feed([*text[:10], 3, 4, 5, 6], trial=2).x
    assert fed == [3] and scores.shape == (3, VOCAB)
    torch.testing.assert_close(scores[1:2], Session(made).feed([*text[:10], 3, 4, 5]).x)


# --- distributions ---


class Bigrams(Module):
    """log p(next | last) from a table: the probability of any text is known."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.log(), requires_grad=False)
        self.embed = Tokens(len(table)).build(1)

    @property
    def wiring(self) -> Any:
        return self.wired(self.embed, None, None, None, "stack")

    def new_state(self, batch: int, room: int, **given: Tensor) -> State:
        return State([], batch, room, self.device)

    def hidden(self, ids: Tensor, *, state: State, **given: Any) -> Tensor:
        state.advance(ids.shape[1])
        return ids[..., None].float()

    def logits(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        return self.table[x[..., 0].long()]


V, DRAWS, LONG = 8, 1000, 3


def bigrams(seed: int, spread: float = 1.3) -> Tensor:
    return (spread * torch.randn(V, V, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def drafting(other: Tensor) -> Draft:
    return Draft(Bigrams(other), ahead=2)


def expected(table: Tensor, search: Sample) -> Tensor:
    """V V V: the probability of each text of three tokens after token 0, cut as the definition says, in fp64."""
    p = (table.double().log() / search.temperature).softmax(-1)
    sizes, order = p.sort(-1, descending=True)
    kept = torch.arange(V).expand(V, V) < (search.top_k or V)
    sizes = sizes * kept
    sizes = sizes / sizes.sum(-1, keepdim=True)
    kept = kept & (sizes.cumsum(-1) - sizes < (search.top_p or 1.0)) & (sizes >= (search.min_p or 0.0) * sizes[:, :1])
    p = torch.zeros_like(p).scatter(1, order, sizes * kept)
    p = p / p.sum(-1, keepdim=True)
    return p[0][:, None, None] * p[:, :, None] * p[None, :, :]


def misfit(search: Sample, proposer: Proposer, table: Tensor) -> float:
    """How many standard deviations χ² of thousands of texts lies above what chance gives."""
    made, counts = Bigrams(table), torch.zeros(V, V, V, dtype=torch.float64)
    session = Session(made)
    for seed in range(DRAWS):
        counts[tuple(speculate(made, [0], search, proposer, limit=LONG, seed=seed, session=session))] += 1
    wanted = (expected(table, search) * DRAWS).flatten()
    assert not counts.flatten()[wanted == 0].any()
    order = wanted.argsort()
    order = order[wanted[order] > 0]
    group = (wanted[order].cumsum(0) / 12).long()  # of about twelve texts or more
    counts, wanted = (torch.zeros(int(group.max()) + 1).double().index_add(0, group, x.flatten()[order])
                      for x in (counts, wanted))  # fmt: skip
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    chi, freedom = float(((counts - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert freedom > 20
    return (chi - freedom) / (2 * freedom) ** 0.5


CUTS = [Sample(temperature=0.6, top_k=5), Sample(top_p=0.8), Sample(temperature=1.4, min_p=0.15)]

TABLE = bigrams(0)
NEAR, SURE = 0.5 * bigrams(1) + 0.5 * TABLE, bigrams(1, spread=6.0)


@pytest.mark.parametrize("search", CUTS, ids=str)
def test_the_distribution_is_the_models_own(search):
    """χ² over texts of three tokens, so that a token that follows from another counts too."""
    draft = drafting(NEAR)
    assert misfit(search, draft, TABLE) < 4
    assert 0.3 < draft.accepted / draft.proposed < 0.9


@pytest.mark.parametrize("proposer", [drafting(SURE), Lookup(longest=1)], ids=["draft", "lookup"])
def test_the_distribution_is_the_models_own_whoever_proposes(proposer):
    assert misfit(Sample(), proposer, TABLE) < 4
    assert proposer.proposed > proposer.accepted


@pytest.mark.parametrize("wrong, draft", [("all stand", NEAR), ("drawn from p", SURE), ("no ratio", NEAR)])
def test_a_wrong_rule_is_found_out(wrong, draft, monkeypatch):
    def judge(self: Choice, scores: Scores, proposal: Proposal | None) -> int:
        if proposal is None or proposal.q is None:
            return int(self.choose(scores, torch.zeros(1, dtype=torch.long)))
        p, q, token = self.probabilities(scores), proposal.q, proposal.token
        least = {"all stand": 0.0, "drawn from p": self.uniform() * float(q[token]), "no ratio": self.uniform()}[wrong]
        if least < float(p[token]):
            return token
        return self.draw(p if wrong == "drawn from p" else (p - q).clamp(min=0))

    monkeypatch.setattr(Choice, "judge", judge)
    assert misfit(Sample(), drafting(draft), TABLE) > 10


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}], ids=str)
def test_what_is_kept_is_the_overlap(options):
    """A proposal stands with probability Σ min(p, q), and the token that comes of it is distributed as p."""
    search, N = Sample(**options), 1500
    z, w = (Scores(2 * torch.randn(1, V, generator=torch.Generator().manual_seed(seed))) for seed in (3, 4))
    choice, counts, stood = Choice(search, 0), torch.zeros(V), 0
    p, q = choice.probabilities(z), choice.probabilities(w)
    for _ in range(N):
        proposal = choice.propose(w)
        token = choice.judge(z, proposal)
        stood += token == proposal.token
        counts[token] += 1
    overlap = float(torch.minimum(p, q).sum())
    assert abs(stood / N - overlap) < 4 * (0.25 / N) ** 0.5
    assert ((counts / N - p).abs() < 4 * (p * (1 - p) / N).sqrt() + 1e-9).all()


def test_p_and_q_that_differ_by_rounding_never_give_what_is_forbidden():
    scores = Scores(torch.tensor([[0.0, 1.0, -float("inf")]]))
    choice = Choice(Sample(), 0)
    q = choice.probabilities(scores) * (1 + 1e-6)
    monkey = iter([0.9999999, 0.5] * 100)
    choice.uniform = lambda: next(monkey)
    assert {choice.judge(scores, Proposal(token, q)) for token in (0, 1) for _ in range(20)} <= {0, 1}


# --- proposers ---


def looked_up(text: list[int], longest: int, most: int) -> list[int]:
    for n in range(min(longest, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, n - 1, -1):
            if text[end - n : end] == text[-n:]:
                grown = list(text)
                for k in range(most):
                    grown.append(grown[end + k])
                return grown[len(text) :]
    return []


def test_a_lookup_finds_what_followed_the_longest_run():
    draw = random.Random(0)
    nothing: Any = None
    for _ in range(150):
        longest, letters = draw.randint(1, 5), draw.randint(1, 4)
        lookup, text = Lookup(longest), draw.choices(range(letters), k=draw.randint(1, 6))
        while len(text) < 30:
            lookup.next = most = draw.randint(1, 7)
            found = lookup.propose(text, 60, nothing, nothing)
            assert [one.token for one in found] == looked_up(text, longest, most)
            text += draw.choices(range(letters), k=draw.randint(1, 4))


def test_few_are_proposed_after_failures_and_more_after_successes():
    lookup = Lookup(ahead=7)
    for accepted, following in ((7, 7), (0, 1), (1, 3), (3, 7), (2, 5)):
        lookup.learn(lookup.next, accepted, accepted + 1)
        assert lookup.next == following
    lookup.learn(0, 0, 1)
    assert lookup.next == 5  # nothing was tried
    assert (lookup.passes, lookup.accepted, lookup.tokens) == (6, 13, 19)


def test_mistakes_are_refused():
    made = model("mixer attention")
    for build, message in (
        (lambda: Lookup(0), "at least the last token is looked up, not 0"),
        (lambda: Lookup(ahead=0), "at least 1 token is proposed at a time, not 0"),
        (lambda: Draft(made, ahead=-1), "at least 1 token is proposed at a time, not -1"),
        (lambda: list(speculate(made, [], Greedy(), Lookup(), limit=3)), "a prompt needs at least one token"),
        (
            lambda: list(speculate(made, [1], Greedy(), Draft(Bigrams(bigrams(0))), limit=3)),
            f"it has {V} tokens and the model has {VOCAB}",
        ),
    ):
        with pytest.raises(QkvError, match=message):
            build()
