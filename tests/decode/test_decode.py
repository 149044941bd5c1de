"""Searches against brute force: no cache, every sequence, every probability."""

import itertools
import math
import weakref

import pytest
import torch

from qkv.decode import AtLeast, Beam, Greedy, Hypothesis, NoRepeat, Past, Rows, Sample, Search, beam, decode
from qkv.errors import QkvError
from qkv.models import EncoderDecoder, Module, Sequence
from qkv.native import fast
from qkv.ops.sample import Scores
from qkv.parts import Attention, Block, Branch, FeedForward, Head, LayerNorm, Learned, Stack, Tokens
from qkv.spec import edit
from tests.contracts.specs import rough

END, ROOM, WIDTH = 0, 16, 8
PROMPTS = [[1, 2, 1], [2], [1, 1, 2, 2, 1, 2], [2, 1]]
LIMITS = [4, 7, 3, 9]
SOURCE = torch.tensor([[1, 2, 3, 1, 2], [3, 3, 1, 0, 0], [2, 1, 1, 3, 0], [1, 0, 0, 0, 0]])
LENGTHS = torch.tensor([5, 3, 4, 1])
SEARCHES = [
    Greedy(),
    Beam(size=3, n_best=3),
    Beam(size=2, length_penalty=0.0),
    Sample(seed=5),
    Sample(top_p=0.8, temperature=1.5),
]


def build(kind: str, vocab: int = 9, position: bool = True) -> Module:
    norm = LayerNorm()
    attn, ffn = Branch(Attention(2), pre=norm), Branch(FeedForward(12), pre=norm)
    embed = Tokens(vocab=vocab, position=Learned(ROOM) if position else None)
    spec: Sequence | EncoderDecoder = Sequence(
        WIDTH, embed=embed, stack=Stack(Block(attn=attn, ffn=ffn), depth=2), norm=norm, head=Head()
    )
    if kind == "pair":
        cross = Branch(Attention(2, over="memory"), pre=norm)
        layers = Stack(Block(attn=attn, ffn=ffn), depth=1), Stack(Block(attn=attn, cross=cross, ffn=ffn), depth=2)
        spec = EncoderDecoder(WIDTH, source=embed, encoder=layers[0], decoder=layers[1], decoder_norm=norm)
    model = rough(spec)
    model.head.weight.data.mul_(4)  # scores that differ
    return model


def memory(model: Module, rows: list[int]) -> dict[str, torch.Tensor]:
    if not hasattr(model, "encode"):
        return {}
    size = int(LENGTHS[rows].max())
    return model.encode(SOURCE[rows, :size], lengths=LENGTHS[rows])


def search(
    model: Module, how: Search, rows: list[int], end: int | None = END, limits: list[int] = LIMITS
) -> list[list[Hypothesis]]:
    known = memory(model, rows) or None
    limits = [limits[row] for row in rows]
    return decode(model, [PROMPTS[row] for row in rows], how, limits=limits, ends=end, memory=known, seeds=rows)


@torch.no_grad()
def log_p(model: Module, row: int, ids: list[int]) -> torch.Tensor:
    """What comes next, from the whole text and without a cache."""
    return model(torch.tensor([PROMPTS[row] + ids]), **memory(model, [row]))[0, -1].log_softmax(-1)


kinds = pytest.mark.parametrize("kind", ["decoder", "pair"])


def same(found: list[Hypothesis], expected: list[Hypothesis]) -> None:
    assert [(h.ids, h.ended) for h in found] == [(h.ids, h.ended) for h in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.log_p == pytest.approx(other.log_p, abs=1e-4) and one.score == pytest.approx(other.score, abs=1e-4)


# --- greedy ---


def greedily(model: Module, row: int, limit: int, end: int | None) -> Hypothesis:
    ids: list[int] = []
    total = 0.0
    while len(ids) < limit:
        scores = log_p(model, row, ids)
        token = int(scores.argmax())
        total += float(scores[token])
        if token == end:
            return Hypothesis(ids, total, total, True)
        ids.append(token)
    return Hypothesis(ids, total, total, False)


@kinds
@pytest.mark.parametrize("end", [None, *range(5)])
def test_greedy_is_the_argmax_without_a_cache(kind, end):
    model = build(kind)
    for row, found in enumerate(search(model, Greedy(), [0, 1, 2, 3], end)):
        same(found, [greedily(model, row, LIMITS[row], end)])


@kinds
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_a_beam_of_one_is_greedy(kind, penalty):
    model = build(kind)
    for end in range(5):
        beams = search(model, Beam(size=1, length_penalty=penalty), [0, 1, 2, 3], end)
        for one, other in zip(beams, search(model, Greedy(), [0, 1, 2, 3], end), strict=True):
            assert (one[0].ids, one[0].ended) == (other[0].ids, other[0].ended)
            assert one[0].log_p == pytest.approx(other[0].log_p, abs=1e-4)


# --- rows ---


@kinds
@pytest.mark.parametrize("how", SEARCHES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind, how):
    model = build(kind)
    for rows in ([0, 1, 2, 3], [3, 1]):
        for row, found in zip(rows, search(model, how, rows), strict=True):
            same(found, search(model, how, [row])[0])


@pytest.mark.parametrize("how", SEARCHES, ids=str)
def test_rows_that_each_have_room_have_room_together(how):
    model, limits = build("decoder"), [ROOM - len(prompt) for prompt in PROMPTS]
    for row, found in enumerate(search(model, how, [0, 1, 2, 3], None, limits)):
        same(found, search(model, how, [row], None, limits)[0])
        assert all(len(h.ids) == limits[row] for h in found)


def test_the_last_token_needs_no_position():
    model = build("decoder")
    assert len(search(model, Greedy(), [1], None, [0, ROOM])[0][0].ids) == ROOM


@kinds
@pytest.mark.parametrize("how", SEARCHES, ids=str)
@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_limit_is_never_exceeded(kind, how, limit):
    for found in search(build(kind), how, [0, 1, 2, 3], END, [limit] * 4):
        for h in found:
            assert len(h.ids) + h.ended <= limit and END not in h.ids


def test_an_end_at_once_leaves_nothing():
    model = build("decoder")
    for row in range(4):
        end = int(log_p(model, row, []).argmax())
        for how in (Greedy(), Beam(size=1), Sample(top_k=1)):
            (found,) = search(model, how, [row], end)
            assert found[0].ids == [] and found[0].ended
            assert found[0].log_p == pytest.approx(float(log_p(model, row, []).max()), abs=1e-4)


def test_the_mode_comes_back():
    model = build("decoder")
    for mode in (True, False):
        search(model.train(mode), Greedy(), [0])
        assert model.training == mode


@pytest.mark.parametrize(
    ("prompts", "limits", "words"),
    [
        ([[1], []], [3, 3], "at least one token"),
        ([], [], "at least one token"),
        ([[1], [2]], [3], ""),
        ([[1], [2]], [3, 0], ""),
        ([[1] * ROOM], [2], "positions"),
    ],
    ids=["an empty prompt", "no prompts", "a missing limit", "a limit of nothing", "no room"],
)
def test_what_cannot_be_is_refused(prompts, limits, words):
    with pytest.raises(QkvError, match=words or None):
        decode(build("decoder"), prompts, Greedy(), limits=limits, ends=END)


def test_a_model_without_a_head_says_nothing():
    with pytest.raises(QkvError, match="head"):
        decode(edit(build("decoder").spec, "head", None).build(), [[1]], Greedy(), limits=[3], ends=END)


@pytest.mark.parametrize("how", SEARCHES)
def test_a_step_has_one_set_of_scores(monkeypatch, how):
    """They are large: those of the step before are let go before the next are made."""
    model, made = build("decoder"), []
    choices = model.choices

    def watched(x: torch.Tensor) -> Scores:
        assert not [ref for ref in made if ref() is not None]
        scores = choices(x)
        made.append(weakref.ref(scores.x))
        return scores

    monkeypatch.setattr(model, "choices", watched)
    search(model, how, [0, 1, 2], None)
    assert len(made) == max(LIMITS[:3])


@torch.inference_mode()
def test_scores_that_somebody_holds_stay():
    """A program writes its scores where those of some steps before stood: only where nobody looks any longer."""
    rows = Rows(fast(build("decoder").float(), 1), PROMPTS, None, [9] * 4, (), ())
    held, copies = [], []
    for token in range(6):
        held.append(rows.scores.x if token % 2 else rows.scores.x[1:3])
        copies.append(held[-1].clone())
        rows.feed(torch.full((4,), token))
    assert all(torch.equal(one, copy) for one, copy in zip(held, copies, strict=True))
    assert len({one.data_ptr() for one in held}) == 6


# --- beams ---


def everything(model: Module, row: int, vocab: int, limit: int, penalty: float) -> list[Hypothesis]:
    """All texts that end within the limit and all that are cut by it, best first."""
    others = [token for token in range(vocab) if token != END]
    texts = [ids for n in range(limit + 1) for ids in itertools.product(others, repeat=n)]
    found = []
    for n in range(limit + 1):
        rows = torch.tensor([[*PROMPTS[row], *ids] for ids in texts if len(ids) == n])
        known = {name: value.expand(len(rows), *value.shape[1:]) for name, value in memory(model, [row]).items()}
        scores = model(rows, **known).log_softmax(-1)[:, len(PROMPTS[row]) - 1 :]
        gained = scores[:, :-1].gather(2, rows[:, len(PROMPTS[row]) :, None]).sum((1, 2))
        total = gained if n == limit else gained + scores[:, -1, END]
        for ids, one in zip(rows[:, len(PROMPTS[row]) :].tolist(), total.tolist(), strict=True):
            length = n + (n < limit)
            found.append(Hypothesis(ids, one, one / length**penalty, n < limit))
    return sorted(found, key=lambda h: -h.score)


@kinds
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0, -0.5])
@torch.no_grad()
def test_a_beam_as_wide_as_all_texts_finds_them_in_order(kind, penalty):
    vocab, limit, model = 4, 4, build(kind, vocab=4)
    width = vocab**limit
    found = search(model, Beam(size=width, length_penalty=penalty, n_best=width), [0, 1], END, [limit, limit - 1])
    for row, limit in ((0, 4), (1, 3)):
        same(found[row], everything(model, row, vocab, limit, penalty))
    assert math.fsum(math.exp(h.log_p) for h in found[0]) == pytest.approx(1, abs=1e-4)


@kinds
@pytest.mark.parametrize("size", [2, 4, 20])
def test_a_beams_scores_are_those_of_its_texts(kind, size):
    model = build(kind)
    for row, found in enumerate(search(model, Beam(size=size, n_best=size, length_penalty=0.7), [0, 1, 2, 3], 4)):
        assert len(found) == size == len({(*h.ids, h.ended) for h in found})
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        for h in found[:4]:
            ids = h.ids + [4] * h.ended
            total = sum(float(log_p(model, row, ids[:n])[token]) for n, token in enumerate(ids))
            assert h.log_p == pytest.approx(total, abs=1e-4)
            assert h.score == pytest.approx(total / len(ids) ** 0.7, abs=1e-4)


def test_a_beam_gives_one_to_its_size():
    for n_best in (0, 3):
        with pytest.raises(QkvError, match=f"1 to 2 hypotheses, not {n_best}"):
            Beam(size=2, n_best=n_best)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_are_the_reference_librarys(penalty):
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Theirs(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self, inner: Module) -> None:
            super().__init__(PretrainedConfig(vocab_size=9, num_hidden_layers=1))
            self.inner = inner

        def forward(self, input_ids, **_):
            return CausalLMOutput(logits=self.inner(input_ids).float())

    model, limit, mixed = build("decoder"), 9, set()
    theirs = Theirs(model)
    for end, (row, prompt) in itertools.product((3, 4), enumerate(PROMPTS)):
        out = theirs.generate(
            torch.tensor([prompt]), num_beams=3, num_return_sequences=3, length_penalty=penalty, do_sample=False,
            max_new_tokens=limit, eos_token_id=end, pad_token_id=end, use_cache=False, output_scores=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        found = search(model, Beam(size=3, n_best=3, length_penalty=penalty), [row], end, [limit] * 4)[0]
        texts = [ids[: ids.index(end)] if end in ids else ids for ids in out.sequences[:, len(prompt) :].tolist()]
        assert [h.ids for h in found] == texts
        assert [h.score for h in found] == pytest.approx(out.sequences_scores.tolist(), abs=1e-4)
        mixed |= {h.ended for h in found}
    assert True in mixed


def test_the_likeliest_of_each_path_are_all_that_a_beam_needs(monkeypatch):
    """As if all paths were extended by all tokens."""

    def whole(logits, past, total, wide):
        scores = total[..., None] + past.ruled(logits.changed(logits.log_p())).x.unflatten(0, total.shape)
        best, at = scores.flatten(1).topk(min(wide, scores[0].numel()), 1)
        return best, at // scores.shape[2], at % scores.shape[2]

    def found(how: Beam) -> list[list[Hypothesis]]:
        past = Past(how.rules, [[1]] * 20, [12] * 20, ENDS, torch.device("cpu"))
        steps = how.run(Scores(table[torch.arange(20)]), past, [12] * 20, ENDS, range(20))
        try:
            move = next(steps)
            while True:
                move = steps.send(Scores(table[move.tokens]))
        except StopIteration as end:
            return end.value

    V = 1500
    ENDS = {7, *range(100, V, 50)}
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0)) * 2
    for options in ({}, {"size": 1}, {"size": 7, "length_penalty": 0.3}, {"rules": (NoRepeat(1), AtLeast(3))}):
        how = Beam(**{"n_best": options.get("size", 4), **options})
        ours = found(how)
        with monkeypatch.context() as patch:
            patch.setattr(beam, "extensions", whole)
            theirs = found(how)
        assert ours == theirs
        assert {h.ended for row in ours for h in row} == {True, False} or how.size == 1


def test_a_wider_beam_finds_more_than_greedy_here():
    model = build("decoder")
    greedy, beams = (search(model, how, [0, 1, 2, 3], None) for how in (Greedy(), Beam(size=8, length_penalty=0.0)))
    better = [beam[0].log_p - one[0].log_p for beam, one in zip(beams, greedy, strict=True)]
    assert max(better) > 0.01


# --- sampling ---

P = torch.tensor([[0.05, 0.4, 0.1, 0.25, 0.2], [0.0625, 0.0625, 0.125, 0.25, 0.5]])


@pytest.mark.parametrize(
    ("sample", "first", "second"),
    [
        (Sample(), {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
        (Sample(top_k=2), {1, 3}, {3, 4}),
        (Sample(top_k=9), {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
        (Sample(top_p=0.3), {1}, {4}),
        (Sample(top_p=0.6), {1, 3}, {3, 4}),
        (Sample(top_p=0.5), {1, 3}, {4}),
        (Sample(top_p=1.0), {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
        (Sample(min_p=0.3), {1, 3, 4}, {3, 4}),
        (Sample(min_p=0.45), {1, 3, 4}, {3, 4}),
        (Sample(min_p=0.55), {1, 3}, {4}),
        (Sample(min_p=1.0), {1}, {4}),
        (Sample(min_p=0.0), {0, 1, 2, 3, 4}, {0, 1, 2, 3, 4}),
        (Sample(top_k=3, top_p=0.7), {1, 3}, {3, 4}),  # of the three, renormalised: 0.47, 0.29, 0.24; 0.57, 0.29, 0.14
        (Sample(top_p=0.7, temperature=0.5), {1, 3}, {4}),  # squared: 0.59, 0.23, 0.15; 0.73, 0.18
        (Sample(min_p=0.3, temperature=0.5), {1, 3}, {4}),  # squared: 1, 0.39, 0.25; 1, 0.25
    ],
    ids=str,
)
def test_what_is_kept(sample, first, second):
    p, ids = sample.kept(Scores(P.log()))
    for row, expected in enumerate((first, second)):
        assert set(ids[row, p[row] > 0].tolist()) == expected
        likely = p[row, p[row] > 0].double()
        wanted = P[row, ids[row, p[row] > 0]].double() ** (1 / sample.temperature)
        torch.testing.assert_close(likely / likely.sum(), wanted / wanted.sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", list(itertools.product([0.6, 1.7], [None, 5], [None, 0.8], [None, 0.2])), ids=str)
def test_what_is_kept_is_what_the_reference_library_keeps(options):
    from transformers.generation import logits_process as theirs

    scores = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    names = theirs.TemperatureLogitsWarper, theirs.TopKLogitsWarper, theirs.TopPLogitsWarper, theirs.MinPLogitsWarper
    expected = scores
    for warper, option in zip(names, options, strict=True):
        expected = expected if option is None else warper(option)(None, expected)
    p, ids = Sample(**dict(zip(("temperature", "top_k", "top_p", "min_p"), options, strict=True))).kept(Scores(scores))
    found = torch.zeros(50, 30).scatter(1, ids, p / p.sum(-1, keepdim=True))
    torch.testing.assert_close(found, expected.softmax(-1))


@pytest.mark.parametrize(
    "sample", [Sample(), Sample(temperature=2.0), Sample(temperature=0.7, top_k=6), Sample(top_p=0.9, seed=3)], ids=str
)
def test_frequencies_are_probabilities(sample):
    """χ² over rows with seeds of their own and over the draws of one row."""
    scores = torch.randn(8, generator=torch.Generator().manual_seed(4)).mul(1.5).log_softmax(-1)
    p, ids = sample.kept(Scores(scores[None]))
    expected = torch.zeros(8).scatter(0, ids[0], p[0] / p.sum())
    rows, steps = 400, 30
    choose = sample.chooser(range(rows))
    drawn = torch.stack([choose(Scores(scores.expand(rows, -1)), torch.arange(rows)) for _ in range(steps)])
    for draws in (drawn.flatten(), drawn[0], drawn[-1]):
        counts, want = draws.bincount(minlength=8), expected * draws.numel()
        assert not counts[expected == 0].any()
        real = expected > 0
        chi = float(((counts - want)[real] ** 2 / want[real]).sum())
        freedom = int(real.sum()) - 1
        assert chi < freedom + 5 * (2 * freedom) ** 0.5
    pairs = (drawn[:-1] * 8 + drawn[1:]).flatten().bincount(minlength=64).view(8, 8)  # one draw does not know the next
    want = expected[:, None] * expected * pairs.sum()
    likely = want > 5
    chi = float(((pairs - want)[likely] ** 2 / want[likely]).sum())
    assert chi < int(likely.sum()) + 5 * (2 * int(likely.sum())) ** 0.5


def sampled(sample: Sample, seeds: list[int]) -> list[list[int]]:
    found = decode(build("decoder"), [[1]] * len(seeds), sample, limits=[9] * len(seeds), ends=None, seeds=seeds)
    return [row[0].ids for row in found]


def test_the_seed_of_a_row_decides():
    texts = sampled(Sample(), [0, 1, 2, 3])
    assert texts == sampled(Sample(), [0, 1, 2, 3]) == sampled(Sample(), [3, 2, 1, 0])[::-1]
    assert len({tuple(ids) for ids in texts}) == 4
    one, other = sampled(Sample(), [7, 7])
    assert one == other


def test_another_seed_samples_another_text():
    texts = [tuple(ids) for seed in (0, 1, -1, 2**32) for ids in sampled(Sample(seed=seed), [0, 1, 2, 3])]
    assert len(set(texts)) == 16


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options):
    with pytest.raises(QkvError):
        Sample(**options)
