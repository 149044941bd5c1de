"""Positions against the papers' formulas, element by element, and against the reference library."""

import copy
import math

import pytest
import torch

from qkv.context import Context
from qkv.errors import QkvError
from qkv.parts import (
    ALiBi,
    Attention,
    Block,
    Branch,
    Learned,
    OneHot,
    Relative,
    Rotary,
    Shared,
    Sinusoidal,
    Stack,
)
from tests.parts.helpers import seeded, wild

C, AT = 6, torch.tensor([[0, 1, 2, 7, 50], [3, 4, 5, 6, 30]])


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded())


# --- added to the embedding ---


@pytest.mark.parametrize("theta", [10000.0, 100.0])
@pytest.mark.parametrize("interleaved", [True, False])
def test_sinusoids_are_the_formula(theta, interleaved):
    x = tokens(2, 5, C)
    out = Sinusoidal(theta=theta, interleaved=interleaved).build(C).double()(x, AT)
    for row in range(2):
        for t in range(5):
            for i in range(C // 2):
                angle = int(AT[row, t]) / theta ** (2 * i / C)
                sine, cosine = (2 * i, 2 * i + 1) if interleaved else (i, C // 2 + i)
                added = out[row, t] - x[row, t]
                assert added[sine] == pytest.approx(math.sin(angle), abs=1e-5)
                assert added[cosine] == pytest.approx(math.cos(angle), abs=1e-5)


def test_sinusoids_need_pairs():
    with pytest.raises(QkvError, match="even width, not 5"):
        Sinusoidal().build(5)


def test_learned_positions_are_rows_of_a_table():
    module, x = wild(Learned(40).build(C)), tokens(2, 5, C)
    out = module(x, AT)
    for row, t in [(0, 0), (0, 3), (1, 4)]:
        torch.testing.assert_close(out[row, t], x[row, t] + module.weight[AT[row, t]])
    assert out[0, 4].isfinite().all()  # padding may lie beyond the table
    torch.testing.assert_close(module(x, AT[1:]), x + module.weight[AT[1]])


def test_one_hot_positions_are_concatenated_and_projected():
    module, x = wild(OneHot(60).build(C)), tokens(2, 5, C)
    out = module(x, AT)
    for row in range(2):
        for t in range(5):
            hot = torch.zeros(60, dtype=torch.float64)
            hot[AT[row, t]] = 1
            torch.testing.assert_close(out[row, t], module.project.weight @ torch.cat((x[row, t], hot)))
    torch.testing.assert_close(module(x, AT[1:])[0], module(x, AT[[1, 1]])[0])


# --- turned into queries and keys ---


@pytest.mark.parametrize(("width", "fraction", "theta"), [(8, 1.0, 10000.0), (8, 0.5, 100.0), (10, 0.4, 50.0)])
def test_rotary_is_a_product_of_complex_numbers(width, fraction, theta):
    module, x = Rotary(theta=theta, fraction=fraction).build(3, width).double(), tokens(2, 3, 5, width)
    out, half = module.rotate(x, module.table(AT, Context(AT))), int(width * fraction) // 2
    rate = torch.tensor([theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(2, 5, half, dtype=torch.float64), AT[:, :, None] * rate)
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * turn[:, None]
    expected = torch.cat((turned.real, turned.imag, x[..., 2 * half :]), -1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_rotary_scores_know_the_distance_only():
    module, q, k = Rotary().build(1, 8).double(), tokens(1, 1, 1, 8), tokens(1, 1, 1, 8) + 1

    def score(query: int, key: int) -> float:
        at = [torch.tensor([[position]]) for position in (query, key)]
        turned = [module.rotate(x, module.table(t, Context(t))) for x, t in zip((q, k), at, strict=True)]
        return float((turned[0] * turned[1]).sum())

    for distance in (-7, 0, 3, 40):
        assert score(1000 + distance, 1000) == pytest.approx(score(50 + distance, 50), abs=1e-4)
    assert abs(score(53, 50) - score(50, 53)) > 1e-3


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.1])
def test_a_rotary_fraction_beyond_the_head_is_refused(fraction):
    with pytest.raises(QkvError, match=r"lies in \(0, 1\]"):
        Rotary(fraction=fraction)


def test_angles_survive_a_model_in_bfloat16():
    at, zero = torch.tensor([[1, 100, 1001]]), torch.zeros(1, 3, 64)
    whole, half = (Rotary().build(1, 64).table(at, Context(at), dtype) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(half[0].float(), whole[0], rtol=0, atol=0.01)
    whole, half = (Sinusoidal().build(64).to(dtype)(zero.to(dtype), at) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(half.float(), whole, rtol=0, atol=0.01)


# --- added to the scores ---


def bias_of(module, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return module.bias(queries[:, :, None], keys[:, None, :], Context(queries))


@pytest.mark.parametrize(
    ("heads", "published"),
    [(8, [2**-n for n in range(1, 9)]), (12, [2**-n for n in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5])],
)
def test_alibi_has_the_published_slopes(heads, published):
    found = -bias_of(ALiBi().build(heads, 4), torch.tensor([[1]]), torch.tensor([[0]])).flatten()
    torch.testing.assert_close(found, torch.tensor(published))


def test_alibi_falls_by_the_slope_with_each_token():
    bias = bias_of(ALiBi().build(3, 4), AT, AT)
    slopes = [2**-4, 2**-8, 2**-2]
    for row, head, q, k in [(0, 0, 3, 1), (0, 1, 1, 4), (1, 2, 4, 0), (1, 2, 0, 4), (1, 1, 2, 2)]:
        assert bias[row, head, q, k].item() == pytest.approx(-slopes[head] * abs(int(AT[row, q] - AT[row, k])))


def test_alibi_and_relative_buckets_are_the_reference_librarys():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.t5.modeling_t5 import T5Attention

    for heads in range(1, 21):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        ours = -bias_of(ALiBi().build(heads, 4), torch.tensor([[1]]), torch.tensor([[0]])).flatten()
        torch.testing.assert_close(ours, theirs)
    distance = torch.arange(-400, 401)
    for both in (True, False):
        for buckets, far in ((32, 128), (8, 20), (20, 300), (6, 7)):
            theirs = T5Attention._relative_position_bucket(distance, both, buckets, far)
            ours = Relative(buckets=buckets, far=far, both=both).build(2, 4).bucket(distance)
            assert torch.equal(ours, theirs), (both, buckets, far)


def test_the_relative_bias_is_the_row_of_its_bucket():
    module = wild(Relative(buckets=8, far=16, both=False).build(3, 4))
    bias = bias_of(module, AT, AT)
    for row, head, q, k, bucket in [
        (0, 0, 1, 0, 1),
        (0, 2, 0, 3, 0),
        (0, 1, 4, 0, 7),
        (1, 2, 2, 0, 2),
        (1, 0, 3, 3, 0),
    ]:
        assert bias[row, head, q, k] == module.weight[bucket, head]


@pytest.mark.parametrize("sizes", [{"buckets": 1}, {"buckets": 32, "far": 8}, {"buckets": 32, "far": 4}], ids=str)
def test_buckets_that_cannot_be_are_refused(sizes):
    with pytest.raises(QkvError):
        Relative(**sizes)


# --- shared by layers ---


def stack(*heads: int) -> Stack:
    blocks = tuple(Block(attn=Branch(Attention(h, position=Shared("near")))) for h in heads)
    return Stack(blocks, depth=len(blocks), shared={"near": Relative(buckets=8, far=16)})


def test_a_shared_bias_is_one_parameter_also_in_a_copy():
    module = stack(2, 2, 2).build(8)
    for one in (module, copy.deepcopy(module).double()):
        names = [name for name, _ in one.named_parameters() if "position" in name or "shared" in name]
        assert names == ["shared.near.weight"] == [name for name in one.state_dict() if "near" in name]
        tables = [one.layer(n).attn.f.position.target[0].weight for n in range(3)]
        assert all(table is one.shared["near"].weight for table in tables)
        assert len(one.prepares) == 1


def test_a_position_that_nobody_shares_is_named():
    spec = Stack(Block(attn=Branch(Attention(2, position=Shared("neer")))), depth=1, shared={"near": ALiBi()})
    with pytest.raises(QkvError, match="no shared position is called 'neer'; did you mean 'near'"):
        spec.build(8)


def test_layers_of_other_heads_cannot_share():
    with pytest.raises(QkvError):
        stack(2, 4).build(8)
