"""Memories of matrices as records, with every system and setting in odd sizes, against the parts in fp64."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from qkv.adapt import quantise
from qkv.masks import Causal, Mask, Same, Window
from qkv.models import Sequence
from qkv.native import fast, slow
from qkv.parts import (
    ALiBi,
    Block,
    Branch,
    ChannelMix,
    DyT,
    Head,
    LayerNorm,
    Learned,
    Memory,
    RMSNorm,
    Rotary,
    Rwkv6,
    Stack,
    Tokens,
    YaRN,
)
from qkv.parts.linear import Linear
from qkv.parts.mixers.memory import (
    Add,
    Decay,
    Delta,
    Exponential,
    PerChannel,
    PerHead,
    PerToken,
    Pointwise,
    Positive,
    Softmax,
    StepSize,
    System,
    Tied,
    Unit,
)
from qkv.parts.position import EndpointScaling, NTKScaling
from qkv.spec import KINDS, kinds
from tests.contracts.specs import ROOM, VOCAB, decoder, rough


def system(kind: str, key_width: int, value_width: int) -> Memory:
    """A published one in other widths; what is turned has an even one."""
    made = KINDS[kind](heads=3).memory(24)
    return replace(made, key_width=key_width + key_width % 2 * bool(made.position), value_width=value_width)


SIZES = ((5, 7), (20, 33))
SYSTEMS = {f"{kind} {K} × {V}": system(kind, K, V) for kind in kinds(System) for K, V in SIZES}
SETTINGS = {
    "one group": Memory(
        3, groups=1, key_width=5, value_width=7, decay=PerChannel(3, temperature=4.0), rule=Delta(2.0),
        feature=Unit("relu", eps=1e-3), conv=4, gate="gelu", gate_rank=5,
    ),
    "groups, a mean": Memory(
        6, groups=2, key_width=4, value_width=17, decay=PerToken(2.0, cap=3.0, start=(1.0, 2.0)),
        rule=Add(True, eps=1e-3), feature=Positive(), conv=1,
    ),
    "tied in groups": Memory(
        4, groups=2, key_width=18, value_width=70, decay=Tied(0.3), rule=Delta(), feature=Softmax(), conv=2,
        position=Rotary(fraction=0.34), gate="tanh",
    ),
    "tied, a mean": Memory(
        2, key_width=4, value_width=5, decay=Tied(), rule=Add(True), feature=Pointwise("sigmoid"), norm=DyT()
    ),
    "an exponential, constant decay": Memory(
        3, groups=1, key_width=19, value_width=50, decay=PerHead(2.0), rule=Exponential(start=0.5, eps=1e-3),
        feature=Unit(),
    ),
    "an exponential, no decay": Memory(3, key_width=2, value_width=3, rule=Exponential(2.0), conv=3, norm=None),
    "an exponential, a vector": Memory(
        3, groups=1, key_width=17, value_width=65, decay=PerChannel(2, temperature=1.0), rule=Exponential(1.0),
        norm=LayerNorm(),
    ),
    "an exponential, steps": Memory(
        4, groups=2, key_width=3, value_width=81, decay=StepSize(3), rule=Exponential(), feature=Positive(),
        norm=RMSNorm(offset=1.0),
    ),
    "steps": Memory(
        3, key_width=6, value_width=113, decay=StepSize(), position=Rotary(scaling=YaRN(4.0, trained=8)),
        norm=LayerNorm(bias=False),
    ),
    "one number": Memory(4, key_width=1, value_width=1, decay=PerChannel(1), rule=Delta(), norm=None, gate="sigmoid"),
    "shared by all": Memory(
        2, groups=1, key_width=4, value_width=4, decay=PerHead(), position=Rotary(scaling=EndpointScaling()),
        gate="relu",
    ),
}  # fmt: skip


def shifting(width: int, mixer: Rwkv6, hidden: int) -> Sequence:
    block = Block(attn=Branch(mixer, pre=LayerNorm()), ffn=Branch(ChannelMix(hidden)))
    return Sequence(width, embed=Tokens(VOCAB), stack=Stack(block, depth=2), norm=LayerNorm(), head=Head())


EVERY = {name: decoder(memory, at=Learned(ROOM)) for name, memory in {**SYSTEMS, **SETTINGS}.items()} | {
    "rwkv 7 × 7": shifting(21, Rwkv6(3, mix_rank=5, decay_rank=7), 37),
    "rwkv 70 × 70": shifting(70, Rwkv6(1, mix_rank=17, decay_rank=1), 5),
    "rwkv 1 × 1": shifting(3, Rwkv6(3, mix_rank=1, decay_rank=33), 16),
}


@cache
def both(name: str) -> tuple[Any, Any]:
    """A model of a memory with a program, and the same in fp64 with none."""
    model, said = rough(EVERY[name]).float(), []
    double = copy.deepcopy(model).double()
    assert fast(model, 1, say=said.append).programs and not said
    return model, double


def random(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_it_is_what_the_part_computes(name: str) -> None:
    """As near to fp64 as torch in fp32."""
    model, double = both(name)
    ids, lengths = random(3, 37), torch.tensor([37, 1, 20])
    most = 2e-6 + 3 * error(slow(copy.deepcopy(model))(ids), double(ids))
    assert error(model(ids), double(ids)) < most < 2e-5
    found, expected = model(ids, lengths=lengths), double(ids, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        assert error(found[row, :n], expected[row, :n]) < most


@torch.no_grad()
@pytest.mark.parametrize("name", EVERY)
def test_steps_are_chunks_are_batches_are_each_row_alone_bit_for_bit(name: str) -> None:
    model, _ = both(name)
    ids = random(3, 37)
    whole = model(ids)
    for cuts in ([1] * 37, [5, 1, 17, 14]):
        state = model.new_state(3, ROOM)
        assert torch.equal(torch.cat([model(some, state=state) for some in ids.split(cuts, 1)], 1), whole)
    lengths = torch.tensor([3, 37, 16])
    ragged = model(ids, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(model(ids[row : row + 1, :n])[0], whole[row, :n])
        assert torch.equal(ragged[row, :n], whole[row, :n])


@torch.no_grad()
@pytest.mark.parametrize("name", ["kda 20 × 33", "tied in groups", "an exponential, a vector", "rwkv 7 × 7"])
def test_threads_and_forks_change_no_bit(name: str) -> None:
    model, ids = both(name)[0], random(3, 20)
    whole, two = model(ids), fast(copy.deepcopy(model), 2)
    assert torch.equal(two(ids), whole)
    state = two.new_state(3, ROOM)
    two(ids[:, :9], state=state)
    mark, chosen = state.mark(), torch.tensor([2, 0, 0])
    two((ids[:, 9:12] + 1) % VOCAB, state=state)
    assert state.rewind(mark, keep=0) == 0
    state.select(chosen)
    assert torch.equal(two(ids[chosen, 9:], state=state), whole[chosen, 9:])


@torch.no_grad()
def test_exponents_may_be_hundreds() -> None:
    """What is held is divided by the largest of them; so is what it is read with."""
    memory = Memory(3, key_width=5, value_width=7, decay=PerToken(1.0), rule=Exponential(), norm=None)
    model = rough(decoder(memory, at=Learned(ROOM))).float()
    for layer in range(3):
        body = model.stack.layer(layer).attn.f
        body.rule.gate.up.weight.mul_(300)
        body.decay.gate.up.weight.mul_(100)
    double, ids = copy.deepcopy(model).double(), random(3, 37)
    expected = double(ids)
    assert (
        expected.isfinite().all() and error(fast(model)(ids), expected) < 1e-4
    )  # an exponent of 300 has 5 digits left


@torch.no_grad()
@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
def test_packed_weights_and_bfloats_are_near_and_equal_themselves(kept: str) -> None:
    memory = Memory(2, decay=PerToken(1.0, cap=5.0), rule=Delta(), feature=Unit(), conv=4, gate="silu", gate_rank=32)
    spec = Sequence(64, embed=Tokens(VOCAB), stack=Stack(Block(f=Branch(memory, pre=RMSNorm())), depth=2))
    model, ids = rough(spec).float(), random(3, 37)
    if kept == "int8":
        assert "stack.1.f.f.decay.gate.up.weight" in quantise(model, kept).formats
        double = model
    else:
        double = copy.deepcopy(model.bfloat16()).double()
    expected = double.hidden(ids)
    whole = fast(model).hidden(ids)
    assert 0 < error(whole, expected) < 0.05
    state = model.new_state(3, ROOM)
    assert torch.equal(torch.cat([model.hidden(some, state=state) for some in ids.split([9, *[1] * 28], 1)], 1), whole)


class Another(Decay):
    """Of another package."""

    def build(self, width: int, heads: int, key_width: int) -> Any:
        return PerHead().build(width, heads, key_width)


MISSING: dict[str, tuple[Memory, Mask, str]] = {
    "documents": (Memory(4), Causal() & Same(), "the mask Same()"),
    "no past": (Memory(4), Causal() & Window(1), "a memory of no more than a token, as the mask"),
    "distances": (Memory(4, position=ALiBi()), Causal(), "the position ALiBi() of a memory"),
    "rates by length": (
        Memory(4, position=Rotary(scaling=NTKScaling(2.0, trained=8))),
        Causal(),
        "the position Rotary(",
    ),
    "tied exponents": (
        Memory(4, decay=Tied(), rule=Exponential()),
        Causal(),
        "the decay Tied() with the rule Exponential()",
    ),
    "another's": (Memory(4, decay=Another()), Causal(), "the decay Another()"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", MISSING)
def test_what_has_no_kernel_stays_with_torch(name: str) -> None:
    memory, mask, why = MISSING[name]
    model, said = rough(decoder(memory, mask=mask)).float(), []
    assert not fast(model, say=said.append).programs
    (line,) = said
    assert line.startswith(f"no native kernel for {why}") and line.endswith(": this model stays with torch")


@torch.no_grad()
@pytest.mark.parametrize("place", ["q", "gate.up", "decay.gate.down", "rule.rate.up"])
def test_an_adapter_stays_with_torch(place: str) -> None:
    memory = Memory(4, decay=PerChannel(), rule=Delta(), feature=Unit(), gate="silu", gate_rank=3)
    model, said = rough(decoder(memory)).float(), []
    layer = model.stack.layer(1).attn.f.get_submodule(place)
    layer.adapters["learned"] = Linear(layer.weight.shape[1], layer.weight.shape[0])
    assert not fast(model, say=said.append).programs and "an adapter: merge it first" in said[0]
