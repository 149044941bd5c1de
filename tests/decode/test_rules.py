"""Rules against the transformers package: one by one on random scores, and whole searches with random models."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as processors

from qkv.decode import (
    AtLeast,
    Ban,
    Beam,
    ForceFirst,
    ForceLast,
    Greedy,
    NoRepeat,
    Past,
    RepetitionPenalty,
    Rule,
    Sample,
    Search,
    Suppress,
    SuppressFirst,
    decode,
    stream,
)
from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Module
from qkv.ops.sample import Scores
from qkv.spec import dump, load
from tests.contracts.specs import decoder, rough
from tests.zoo import test_bart, test_gpt2, test_marian
from tests.zoo.parity import ROWS, VOCAB, loaded, texts

NEW = 12
WORDS = (
    [[n] for n in range(5, 12)] + [[a, b] for a in range(20, 61) for b in range(3, 58)] + [[7, 8, n] for n in (3, 9)]
)
SOME = list(range(3, 36))

Settings = dict[str, Any]
CASES: list[tuple[Settings, tuple[Rule, ...]]] = [
    ({"repetition_penalty": 1.9}, (RepetitionPenalty(1.9),)),
    ({"repetition_penalty": 0.4}, (RepetitionPenalty(0.4),)),
    ({"no_repeat_ngram_size": 1}, (NoRepeat(1),)),
    ({"no_repeat_ngram_size": 2}, (NoRepeat(2),)),
    ({"bad_words_ids": WORDS}, (Ban(WORDS),)),
    ({"min_length": 11}, (AtLeast(11, prompt=True),)),
    ({"min_new_tokens": 7}, (AtLeast(7),)),
    ({"suppress_tokens": SOME}, (Suppress(SOME),)),
    ({"begin_suppress_tokens": SOME}, (SuppressFirst(SOME),)),
    ({"forced_eos_token_id": 44}, (ForceLast(44),)),
    ({"forced_bos_token_id": 33}, (ForceFirst(33),)),
    (
        {
            "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": WORDS, "min_length": 10,
            "forced_bos_token_id": 50, "forced_eos_token_id": 44, "suppress_tokens": SOME[:9],
            "begin_suppress_tokens": SOME,
        },
        (
            RepetitionPenalty(1.2), NoRepeat(3), Ban(WORDS), AtLeast(10, prompt=True), ForceFirst(50), ForceLast(44),
            Suppress(SOME[:9]), SuppressFirst(SOME, after=1),
        ),
    ),
]  # fmt: skip
ALL = [rules for _, rules in CASES]
NAMES = [" ".join([*settings][:2]) for settings, _ in CASES]


# --- one by one ---


def past(rules: tuple[Rule, ...], prompts: list[list[int]], new: list[list[int]], limits: list[int]) -> Past:
    found = Past(rules, prompts, limits, {2, 44}, torch.device("cpu"))
    for ids in zip(*new, strict=True):
        found.feed(torch.tensor(ids))
    return found


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (RepetitionPenalty(1.4), lambda read: processors.RepetitionPenaltyLogitsProcessor(1.4)),
        (NoRepeat(1), lambda read: processors.NoRepeatNGramLogitsProcessor(1)),
        (NoRepeat(3), lambda read: processors.NoRepeatNGramLogitsProcessor(3)),
        (Ban([[1], [2], [3, 1], [1, 4], [0, 0, 0], [5] * 30]), lambda read: processors.NoBadWordsLogitsProcessor(
            [[1], [2], [3, 1], [1, 4], [0, 0, 0], [5] * 30], [2, 44])),
        (AtLeast(12, prompt=True), lambda read: processors.MinLengthLogitsProcessor(12, [2, 44])),
        (AtLeast(4), lambda read: processors.MinNewTokensLengthLogitsProcessor(read, 4, [2, 44])),
        (Suppress([4, 0]), lambda read: processors.SuppressTokensLogitsProcessor([4, 0])),
        (SuppressFirst([4, 0]), lambda read: processors.SuppressTokensAtBeginLogitsProcessor([4, 0], read)),
        (SuppressFirst([3], after=2), lambda read: processors.SuppressTokensAtBeginLogitsProcessor([3], read + 2)),
        (ForceLast(3), lambda read: processors.ForcedEOSTokenLogitsProcessor(read + 6, 3)),
    ],
    ids=lambda one: str(one) if isinstance(one, Rule) else "",
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 4])
def test_a_rule_is_theirs_row_by_row(rule: Rule, theirs: Any, rows: int) -> None:
    """Five tokens of which few are in use, so that they repeat; rows of unlike lengths."""
    chance, generator, changed = random.Random(0), torch.Generator().manual_seed(0), 0
    for made in range(7):
        prompts = [chance.choices(range(6), k=chance.randint(1, 13)) for _ in range(rows)]
        new = [chance.choices(range(6), k=made) for _ in range(rows)]
        limits = [chance.choice([6, made + 1]) if rows > 1 and not isinstance(rule, ForceLast) else 6] * rows
        scores = torch.randn(rows, VOCAB, generator=generator)
        before = scores.clone()
        found = past((rule,), prompts, new, limits).ruled(Scores(scores)).x
        assert torch.equal(scores, before)
        for row in range(rows):
            ids = torch.tensor([prompts[row] + new[row]])
            wanted = theirs(len(prompts[row]))(ids, scores[row : row + 1].clone())
            assert torch.equal(found[row : row + 1], wanted), (made, row)
            changed += not torch.equal(wanted, scores[row : row + 1])
    assert changed


def test_what_a_model_lacks_is_not_looked_at_and_not_forced() -> None:
    scores, prompts = torch.randn(1, 6), [[9, 1, 9]]
    for rule in (Suppress([7, -1]), Ban([[8], [9, 7]]), RepetitionPenalty(2.0), NoRepeat(1)):
        found = Past((rule,), prompts, [3], [], torch.device("cpu")).ruled(Scores(scores)).x
        assert torch.equal(
            found != scores, torch.arange(6)[None].eq(1) & isinstance(rule, RepetitionPenalty | NoRepeat)
        )
    for rule in (ForceFirst(6), ForceLast(6)):
        with pytest.raises(QkvError, match="the token 6 is to be forced, and the model has 6"):
            Past((rule,), prompts, [1], [], torch.device("cpu")).ruled(Scores(scores))


def test_rules_are_values() -> None:
    search = Beam(3, rules=ALL[-1])
    assert load(dump(search)) == search and len({*search.rules}) == 8
    assert load({"kind": "greedy", "rules": [{"kind": "no-repeat", "size": 3}]}) == Greedy(rules=(NoRepeat(3),))
    for mistake, words in (
        (lambda: RepetitionPenalty(0.0), "above 0"), (lambda: RepetitionPenalty(float("nan")), "found nan"),
        (lambda: NoRepeat(-1), "found -1"), (lambda: Ban([[1], []]), "leave the empty one out"),
        (lambda: AtLeast(-1), "not -1"), (lambda: ForceFirst(-1), "not -1"), (lambda: ForceLast(-2), "not -2"),
    ):  # fmt: skip
        with pytest.raises(QkvError, match=words):
            mistake()


# --- whole searches ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Module]]:
    folder: Path = tmp_path_factory.mktemp("rules")
    varied = test_gpt2.model(tie_word_embeddings=False)  # does not write one token again and again
    with torch.no_grad():
        varied.transformer.wte.weight.mul_(6), varied.transformer.wpe.weight.mul_(6)
        varied.transformer.ln_f.bias.zero_()
    theirs = {
        "gpt2": varied,
        "bart": test_bart.model("Bart", "ForConditionalGeneration"),
        "marian": test_marian.model(),
    }
    return {name: (one, loaded(one, folder / name)) for name, one in theirs.items()}


def generated(
    theirs: PreTrainedModel, ids: torch.Tensor, ends: list[int], **settings: Any
) -> tuple[list[list[int]], list[float]]:
    """What transformers makes of each row, up to its end, and its scores."""
    pairs = theirs.config.is_encoder_decoder
    config = GenerationConfig(**{
        "do_sample": False, "max_new_tokens": NEW, "early_stopping": False, "pad_token_id": 0, "eos_token_id": ends,
        "bos_token_id": 1, "decoder_start_token_id": 1 if pairs else None, "use_cache": True, **settings,
    })  # fmt: skip
    theirs.generation_config = config
    tf.utils.logging.set_verbosity_error()
    found = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    rows = found.sequences[:, 1 if pairs else ids.shape[1] :].tolist()
    cut = [row[: next((n for n, token in enumerate(row) if token in ends), len(row))] for row in rows]
    return cut, found.sequences_scores.tolist() if "sequences_scores" in found else []


def ours(model: Module, ids: torch.Tensor, ends: list[int], search: Search) -> tuple[list[list[int]], list[float]]:
    prompts, memory = ids.tolist(), None
    if isinstance(model, EncoderDecoderModel):
        with torch.no_grad():
            prompts, memory = [[1]] * len(ids), model.encode(ids)
    found = [best[0] for best in decode(model, prompts, search, limits=[NEW] * len(ids), ends=ends, memory=memory)]
    return [one.ids for one in found], [one.score for one in found]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("settings", "rules"), CASES, ids=NAMES)
@pytest.mark.parametrize("kind", ["gpt2", "bart", "marian"])
def test_a_search_with_rules_is_generate(
    kind: str, settings: Settings, rules: tuple[Rule, ...], size: int, models: Any
) -> None:
    theirs, model = models[kind]
    if kind == "gpt2":  # which forces a first token only after a prompt of one
        settings = {key: value for key, value in settings.items() if key != "forced_bos_token_id"}
        rules = tuple(
            SuppressFirst(rule.tokens) if isinstance(rule, SuppressFirst) else rule
            for rule in rules if not isinstance(rule, ForceFirst)
        )  # fmt: skip
    ids = texts(longest=7)[0]
    plain = Beam(size) if size > 1 else Greedy()
    usual = ours(model, ids, [], plain)[0]
    ends = [usual[0][3], 44]  # one that comes early
    for rows in (1, ROWS):
        wanted, scores = generated(theirs, ids[:rows], ends, num_beams=size, **settings)
        search = Beam(size, rules=rules) if size > 1 else Greedy(rules=rules)
        found, ranks = ours(model, ids[:rows], ends, search)
        assert found == wanted
        assert size == 1 or ranks == pytest.approx(scores, rel=1e-4)
    if settings:
        assert found != ours(model, ids, ends, plain)[0]


@pytest.mark.parametrize("early", [False, True])
def test_beams_that_stop_early_and_end_in_many_ways(early: bool, models: Any) -> None:
    theirs, model = models["bart"]
    ids, ends, all_found = texts(longest=7)[0], [5, 9, 17, 22, 44, 51], []
    for size in (2, 5):
        for penalty in (-0.5, 2.5):
            wanted, scores = generated(
                theirs, ids, ends, num_beams=size, early_stopping=early, length_penalty=penalty, min_new_tokens=2
            )
            rules = (AtLeast(2),)
            search = Beam(size, length_penalty=penalty, early_stopping=early, rules=rules)
            found, ranks = ours(model, ids, ends, search)
            assert found == wanted and ranks == pytest.approx(scores, rel=1e-4)
            all_found.append(found == ours(model, ids, ends, Beam(size, length_penalty=penalty, rules=rules))[0])
    assert all(all_found) is not early


@pytest.mark.parametrize("rules", ALL, ids=NAMES)
def test_a_sample_draws_from_what_the_rules_leave(rules: tuple[Rule, ...], models: Any) -> None:
    """Rules come before the temperature, on the model's own scores: the same probabilities as there."""
    theirs = models["gpt2"][0]
    [settings] = [settings for settings, own in CASES if own == rules]
    ids = texts(longest=7)[0]
    with torch.no_grad():
        scores = theirs(ids).logits[:, -1]
    own = GenerationConfig(
        **settings, do_sample=True, temperature=0.7, top_p=0.9, max_length=8, eos_token_id=[44, 3], pad_token_id=0
    )
    theirs._prepare_special_tokens(own, device="cpu")
    wanted = theirs._get_logits_processor(own, input_ids_seq_length=7)(ids, scores)
    # There a forced first token comes after a prompt of one.
    heeded = [rule for rule in rules if not isinstance(rule, ForceFirst)]
    heeded = [SuppressFirst(rule.tokens) if isinstance(rule, SuppressFirst) else rule for rule in heeded]
    changed = Past(heeded, ids.tolist(), [1] * ROWS, [44, 3], torch.device("cpu")).ruled(Scores(scores)).x
    p, tokens = Sample(temperature=0.7, top_p=0.9).kept(Scores(changed))
    torch.testing.assert_close(torch.zeros_like(p).scatter(1, tokens, p / p.sum(1, keepdim=True)), wanted.softmax(-1))


# --- rows, streams, and what is left ---

SEARCHES = [Greedy(), Beam(3, n_best=3), Sample(seed=5)]
PROMPTS = [[1, 2, 1], [2], [1, 1, 2, 2, 1, 2, 9, 9], [2, 1]]
LIMITS = [4, 7, 9, 6]


@pytest.mark.parametrize("rules", ALL, ids=NAMES)
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_a_row_heeds_its_own_past(search: Search, rules: tuple[Rule, ...], models: Any) -> None:
    model, how = models["gpt2"][1], type(search)(**{**dict(search.children()), "rules": rules})
    together = decode(model, PROMPTS, how, limits=LIMITS, ends=44)
    for n, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True)):
        alone = decode(model, [prompt], how, limits=[limit], ends=44, seeds=[n])[0]
        assert [(h.ids, h.ended) for h in together[n]] == [(h.ids, h.ended) for h in alone]
        assert [h.score for h in together[n]] == pytest.approx([h.score for h in alone], abs=1e-3)
        if not isinstance(how, Beam):
            assert list(stream(model, prompt, how, limit=limit, ends=[44], seed=n)) == alone[0].ids


def test_log_p_of_a_single_path_is_the_models_own(models: Any) -> None:
    model, ids = models["gpt2"][1], [5, 6, 7]
    for rules in ALL:
        for how in (Greedy(rules=rules), Sample(seed=1, rules=rules)):
            [[found]] = decode(model, [ids], how, limits=[5], ends=None)
            with torch.no_grad():
                log_p = model(torch.tensor([ids + found.ids]))[0, len(ids) - 1 : -1].log_softmax(-1)
            assert found.log_p == pytest.approx(float(log_p[range(5), found.ids].sum()), abs=1e-3)


def test_a_text_to_which_the_rules_leave_nothing_stops_there() -> None:
    model = rough(decoder())
    vocabulary = len(model.wiring.embed.table)
    for how in (Greedy(rules=(NoRepeat(1),)), Sample(rules=(NoRepeat(1),)), Beam(3, rules=(NoRepeat(1),))):
        short, long = decode(model, [[0], [1, 2]], how, limits=[3, 30], ends=None)
        assert len(short[0].ids) == 3
        assert sorted([1, 2, *long[0].ids]) == list(range(vocabulary)) and not long[0].ended
        if not isinstance(how, Beam):
            assert sorted(stream(model, [3], how, limit=30)) == [n for n in range(vocabulary) if n != 3]
    tokens = list(range(vocabulary))
    for how in (Greedy(rules=(Suppress(tokens),)), Beam(2, rules=(Suppress(tokens),))):
        [[found]] = decode(model, [[1]], how, limits=[5], ends=None)
        assert (found.ids, found.log_p, found.ended) == ([], 0.0, False)
