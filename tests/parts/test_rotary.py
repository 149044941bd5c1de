"""Scalings of rotary positions against the reference library, the papers' formulas in fp64, and the contracts."""

import math

import pytest
import torch

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts import (
    Attention,
    BandScaling,
    EndpointScaling,
    LinearScaling,
    LongRope,
    NTKScaling,
    Rotary,
    Scaling,
    Shared,
    YaRN,
)
from qkv.spec import dump, edit, kinds, load
from tests.contracts.specs import VOCAB, decoder, rough
from tests.parts.helpers import seeded

K, TRAINED = 12, 40
SHORT, LONG = (1.0, 1.1, 1.3, 1.7, 2.0, 2.5), (1.2, 2.0, 3.5, 6.0, 9.0, 14.0)
YARN = {"rope_type": "yarn", "factor": 6.5, "original_max_position_embeddings": TRAINED}
LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": list(SHORT),
    "long_factor": list(LONG),
    "original_max_position_embeddings": TRAINED,
}

# name: (ours, theta, the reference library's rope_parameters)
STATIC = {
    "none": (None, 1234.5, {"rope_type": "default"}),
    "linear": (LinearScaling(3.7), 500.0, {"rope_type": "linear", "factor": 3.7}),
    "bands": (
        BandScaling(8.5, low=0.7, high=5.3, trained=TRAINED),
        70.0,
        {
            "rope_type": "llama3",
            "factor": 8.5,
            "low_freq_factor": 0.7,
            "high_freq_factor": 5.3,
            "original_max_position_embeddings": TRAINED,
        },
    ),
    "yarn": (YaRN(6.5, trained=TRAINED, fast=5, slow=0.5), 90.0, YARN | {"beta_fast": 5, "beta_slow": 0.5}),
    "yarn whose bounds are beyond the head": (YaRN(6.5, trained=TRAINED), 10000.0, YARN),
    "yarn whose bounds are one": (
        YaRN(0.5, trained=TRAINED, fast=1e-9, slow=1e-9),
        300.0,
        YARN | {"factor": 0.5, "beta_fast": 1e-9, "beta_slow": 1e-9},
    ),
    "yarn between pairs": (
        YaRN(6.5, trained=TRAINED, fast=4.0, slow=0.3, attention_factor=1.9, truncate=False),
        150.0,
        YARN | {"beta_fast": 4.0, "beta_slow": 0.3, "attention_factor": 1.9, "truncate": False},
    ),
    "yarn of two magnitudes": (
        YaRN(6.5, trained=TRAINED, fast=3.0, slow=1.0, numerator=0.7, denominator=1.3),
        60.0,
        YARN | {"beta_fast": 3.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    ),
}
BY_LENGTH = {
    "ntk": (NTKScaling(2.5, trained=TRAINED), 600.0, {"rope_type": "dynamic", "factor": 2.5}),
    "long rope": (LongRope(SHORT, long=LONG, trained=TRAINED, factor=4.0), 700.0, LONG_ROPE | {"factor": 4.0}),
    "long rope with a magnitude": (
        LongRope(SHORT, long=LONG, trained=TRAINED, factor=4.0, attention_factor=1.3),
        700.0,
        LONG_ROPE | {"factor": 4.0, "attention_factor": 1.3},
    ),
    "long rope that is no longer": (
        LongRope(SHORT, long=LONG, trained=TRAINED, factor=0.5),
        700.0,
        LONG_ROPE | {"factor": 0.5},
    ),
}
CASES = STATIC | BY_LENGTH


def waves(rotary: Rotary, at: torch.Tensor, lengths=None, dtype=torch.float32, width: int = K):
    """cos and sin of each angle, B T K, as the reference library has them."""
    module = rotary.build(1, width)
    cos, sin = (wave[:, 0] for wave in module.table(at, Context(at, lengths=lengths), dtype))
    half = sin.shape[-1] // 2
    torch.testing.assert_close(sin[..., :half], -sin[..., half:], rtol=0, atol=0)
    return cos, torch.cat((sin[..., half:], sin[..., half:]), -1)


def configured(config_class, theta: float, parameters: dict, width: int = K):
    rope = {"rope_theta": theta, **parameters}
    most = TRAINED if parameters["rope_type"] == "dynamic" else 4 * TRAINED
    more = {"original_max_position_embeddings": TRAINED} if parameters["rope_type"] == "longrope" else {}
    return config_class(
        hidden_size=2 * width,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=most,
        rope_parameters=rope,
        **more,
    )


# --- against the reference library ---


@pytest.mark.parametrize("length", [1, TRAINED - 1, TRAINED, TRAINED + 1, 97, 3 * TRAINED])
@pytest.mark.parametrize("name", CASES)
def test_waves_are_the_reference_librarys(name, length):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    scaling, theta, parameters = CASES[name]
    theirs = LlamaRotaryEmbedding(configured(LlamaConfig, theta, parameters))
    at = torch.arange(length)[None]
    expected = theirs(torch.zeros(1), at)
    for ours, wave in zip(waves(Rotary(theta=theta, scaling=scaling), at), expected, strict=True):
        torch.testing.assert_close(ours, wave, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1])
@pytest.mark.parametrize("fraction", [1.0, 0.75])
def test_partly_turned_heads_scale_as_the_reference_librarys(fraction, length):
    from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3RotaryEmbedding

    width = int(K / fraction)
    parameters = LONG_ROPE | {"factor": 4.0, "partial_rotary_factor": fraction}
    theirs = Phi3RotaryEmbedding(configured(Phi3Config, 700.0, parameters, width))
    scaling = LongRope(SHORT, long=LONG, trained=TRAINED, factor=4.0)
    rotary, at = Rotary(theta=700.0, fraction=fraction, scaling=scaling), torch.arange(length)[None]
    for ours, wave in zip(waves(rotary, at, width=width), theirs(torch.zeros(1), at), strict=True):
        torch.testing.assert_close(ours, wave, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("name", [name for name in STATIC if name != "none"])
def test_rates_are_the_reference_librarys_for_the_widths_of_models(name, width):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaConfig

    scaling, _, parameters = STATIC[name]
    config = configured(LlamaConfig, 500000.0, parameters, width)
    theirs, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)
    torch.testing.assert_close(
        scaling.rates(500000.0, width, torch.zeros(1, 1, 1)).flatten(), theirs, rtol=1e-6, atol=0
    )
    assert scaling.magnitude == pytest.approx(magnitude)


@torch.no_grad()
@pytest.mark.parametrize("length", [TRAINED, TRAINED + 9])
@pytest.mark.parametrize("name", CASES)
def test_attention_gives_the_reference_librarys_scores(name, length):
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaling, theta, parameters = CASES[name]
    q, k = torch.randn(2, 2, 3, length, K, generator=seeded())
    at = torch.arange(length)[None]
    theirs = LlamaRotaryEmbedding(configured(LlamaConfig, theta, parameters))
    a, b = apply_rotary_pos_emb(q, k, *theirs(q, at))
    module = Rotary(theta=theta, scaling=scaling).build(3, K)
    table = module.table(at, Context(at), q.dtype)
    torch.testing.assert_close(module.rotate(q, table) @ module.rotate(k, table).mT, a @ b.mT, rtol=0, atol=1e-4)


# --- against the formulas ---


def published_rates(name: str) -> list[float]:
    """Rates of the cases that have one formula for every pair, in Python's numbers."""
    _, theta, _ = CASES[name]
    plain = [theta ** (-2 * i / K) for i in range(K // 2)]
    if name == "linear":
        return [rate / 3.7 for rate in plain]
    if name == "bands":
        found = []
        for rate in plain:
            wave = 2 * math.pi / rate
            if wave < TRAINED / 5.3:
                found.append(rate)
            elif wave > TRAINED / 0.7:
                found.append(rate / 8.5)
            else:
                blend = (TRAINED / wave - 0.7) / (5.3 - 0.7)
                found.append((1 - blend) * rate / 8.5 + blend * rate)
        assert found[0] == plain[0] and found[-1] == plain[-1] / 8.5 and len(set(found)) > 2
        return found
    if name == "leading":
        return [rate / 1.5 for rate in plain[:2]] + [0.0] * 4
    return plain


@pytest.mark.parametrize("name", ["none", "linear", "bands"])
def test_waves_of_a_model_in_fp64_are_the_formula(name):
    scaling, theta, _ = CASES[name]
    at = torch.tensor([[0, 3, 5000, 123456]])
    cos, sin = waves(Rotary(theta=theta, scaling=scaling), at, dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float64
    angle = at[..., None] * torch.tensor(published_rates(name) * 2, dtype=torch.float64)
    torch.testing.assert_close(cos, angle.cos(), rtol=0, atol=1e-9)
    torch.testing.assert_close(sin, angle.sin(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", STATIC)
def test_scores_depend_on_the_distance_only(name):
    scaling, theta, _ = CASES[name]
    module = Rotary(theta=theta, scaling=scaling).build(1, K)
    q, k = torch.randn(2, 1, 1, 1, K, dtype=torch.float64, generator=seeded())
    growth = 1.0 if scaling is None else scaling.magnitude**2

    def score(query: int, key: int) -> float:
        at = [torch.tensor([[place]]) for place in (query, key)]
        a, b = (module.rotate(x, module.table(t, Context(t), x.dtype)) for x, t in zip((q, k), at, strict=True))
        return float((a * b).sum())

    assert score(17, 17) == pytest.approx(growth * float((q * k).sum()), abs=1e-12)
    for distance in (-29, 0, 1, 75):
        assert score(9000 + distance, 9000) == pytest.approx(score(50 + distance, 50), abs=1e-9)
    assert abs(score(53, 50) - score(50, 53)) > 1e-3


def test_models_in_half_precision_keep_their_angles():
    at = torch.arange(5000, 5003)[None]
    for name, (scaling, theta, _) in CASES.items():
        whole, half = (
            waves(Rotary(theta=theta, scaling=scaling), at, dtype=d) for d in (torch.float32, torch.bfloat16)
        )
        assert torch.equal(whole[0], half[0]) and torch.equal(whole[1], half[1]), name
    x = torch.randn(1, 1, 3, K).bfloat16()
    module = Rotary().build(1, K)
    assert module.rotate(x, module.table(at, Context(at), x.dtype)).dtype == torch.bfloat16


# --- lengths ---


@pytest.mark.parametrize("name", BY_LENGTH)
def test_each_row_is_turned_by_its_own_length(name):
    scaling, theta, _ = BY_LENGTH[name]
    rotary, lengths = Rotary(theta=theta, scaling=scaling), torch.tensor([90, TRAINED, 0, 67])
    at = torch.arange(90)[None]
    for one, alone in zip(waves(rotary, at, lengths), waves(rotary, at), strict=True):
        assert torch.equal(one[0], alone[0])
        assert not torch.allclose(one[1], alone[0])
    for row, length in enumerate(lengths.tolist()):
        if length:
            together, alone = waves(rotary, at, lengths), waves(rotary, at[:, :length])
            for one, other in zip(together, alone, strict=True):
                torch.testing.assert_close(one[row, :length], other[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_step_is_turned_by_the_length_that_it_reaches(name):
    scaling, theta, _ = BY_LENGTH[name]
    rotary = Rotary(theta=theta, scaling=scaling)
    steps = waves(rotary, torch.tensor([[29], [39], [40], [77]]))
    for row, length in enumerate((30, 40, 41, 78)):
        whole = waves(rotary, torch.arange(length)[None])
        for one, other in zip(steps, whole, strict=True):
            torch.testing.assert_close(one[row, 0], other[0, -1], rtol=0, atol=0)


# --- the contracts: below the trained length for all, beyond it for those that know no length ---


def model_of(name: str, shared: bool = False):
    scaling, theta, _ = CASES[name]
    if isinstance(scaling, LongRope):
        scaling = edit(edit(scaling, "short", SHORT[:2]), "long", LONG[:2])
    rotary = Rotary(theta=theta, scaling=scaling)
    spec = decoder(Attention(4, position=Shared("table") if shared else rotary))
    return rough(edit(spec, "stack.shared", {"table": rotary})), 75 if name in STATIC else TRAINED


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_pieces_ragged_rows_and_padding_give_what_the_whole_gives(name):
    model, T = model_of(name)
    ids = torch.randint(VOCAB, (3, T), generator=seeded(1))
    whole, state = model(ids), model.new_state(3, T)
    pieces = [model(piece, state=state) for piece in ids.split([T - 9, 1, 1, 7], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    valid = torch.ones(3, T, dtype=torch.bool)
    valid[0, :5] = valid[1, 20:] = False
    out, state = model(ids, valid=valid), model.new_state(3, T + 1)
    torch.testing.assert_close(model(ids, valid=valid, state=state)[valid], out[valid], rtol=0, atol=1e-9)
    for row in (0, 1):
        alone = model(ids[row, valid[row]][None])
        torch.testing.assert_close(out[row, valid[row]], alone[0], rtol=0, atol=1e-9)
    after = model(ids[:2, :1].expand(2, 1), state=state.select(torch.tensor([0, 1])))
    longer = torch.cat((ids[0, valid[0]], ids[0, :1]))[None]
    torch.testing.assert_close(after[0, 0], model(longer)[0, -1], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", BY_LENGTH)
def test_beyond_the_trained_length_rows_stay_apart_and_a_cache_keeps_its_keys(name):
    model, T = model_of(name)[0], 70
    ids = torch.randint(VOCAB, (2, T), generator=seeded(2))
    valid = torch.ones(2, T, dtype=torch.bool)
    valid[1, 30:] = False
    out = model(ids, valid=valid)
    torch.testing.assert_close(out[0], model(ids[:1])[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(out[1, :30], model(ids[1:, :30])[0], rtol=0, atol=1e-9)
    state = model.new_state(2, T)
    first = model(ids[:, :TRAINED], state=state)
    keys = state.cells[0]["attn"].k[:, :, :TRAINED].clone()
    assert model(ids[:, TRAINED:], state=state).isfinite().all()
    assert torch.equal(state.cells[0]["attn"].k[:, :, :TRAINED], keys)
    assert not torch.allclose(first, model(ids)[:, :TRAINED])  # the whole is turned anew: no cache can follow


@torch.no_grad()
def test_layers_may_share_a_scaled_position():
    (one, _), (other, _) = model_of("ntk"), model_of("ntk", shared=True)
    ids = torch.randint(VOCAB, (2, 60), generator=seeded(3))
    assert torch.equal(one(ids), other(ids)) and len(one.stack.prepares) == len(other.stack.prepares) == 1


@torch.no_grad()
def test_a_forward_makes_one_table_and_a_state_dict_holds_none(monkeypatch):
    made, rates = [], NTKScaling.rates
    monkeypatch.setattr(NTKScaling, "rates", lambda *given: made.append(1) or rates(*given))
    model, _ = model_of("ntk")
    model(torch.zeros(1, 5, dtype=torch.long))
    assert len(made) == 1
    assert not any(
        "position" in name or "shared" in name for name, _ in (*model.named_buffers(), *model.state_dict().items())
    )


# --- specs ---


def test_every_scaling_is_tested_here_and_survives_a_file():
    scalings = [scaling for scaling, _, _ in CASES.values() if scaling is not None]
    scalings.append(EndpointScaling())  # not the reference library's: test_memory.py has the formula of its paper
    assert {scaling.kind for scaling in scalings} == set(kinds(Scaling))
    for scaling in scalings:
        assert load(dump(Rotary(theta=3.5, scaling=scaling))) == Rotary(theta=3.5, scaling=scaling)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Rotary(theta=1.0), "theta, .* lies above 1, not at 1.0"),
        (lambda: Rotary(theta=math.inf), "lies above 1"),
        (lambda: LinearScaling(0.0), "the factor of linear-scaling is a number above 0, not 0.0"),
        (lambda: LinearScaling(math.nan), "expected a number, found nan"),
        (lambda: NTKScaling(2.0, trained=0), "the trained of ntk-scaling"),
        (lambda: BandScaling(8.0, low=4.0, high=4.0, trained=8), "low below high, not 4.0 and 4.0"),
        (lambda: YaRN(4.0, trained=8, fast=1.0, slow=2.0), "slow no larger than fast, not 2.0 and 1.0"),
        (lambda: YaRN(4.0, trained=8, attention_factor=-1.0), "the attention_factor of yarn"),
        (lambda: YaRN(4.0, trained=8, numerator=0.0), "the numerator of yarn"),
        (lambda: LongRope((1.0, 0.0), long=(1.0, 1.0), trained=8, factor=2.0), "the short of long-rope .*, not 0.0"),
        (lambda: LongRope((1.0,), long=(1.0,), trained=1, factor=2.0), "at least 2, not 1"),
        (lambda: Rotary(scaling=NTKScaling(2.0, trained=8)).build(1, 2), "more than 2 values are turned, not 2"),
        (
            lambda: Rotary(scaling=LongRope((1.0, 2.0), long=(1.0,), trained=8, factor=2.0)).build(1, 6),
            "needs 3 numbers for heads of which 6 values turn; short has 2 and long 1",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(make, sentence):
    with pytest.raises(QkvError, match=sentence):
        make()
