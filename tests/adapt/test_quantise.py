"""Weights of fewer bits: which they are, how far they are off, and what goes on working on them."""

import copy
import sys
import weakref
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor, nn

from qkv.adapt import add_lora, dequantise, loras, merge, quantise
from qkv.errors import QkvError
from qkv.masks import Full
from qkv.models import EncoderDecoder, Module, Sequence
from qkv.ops.blocks.packed import Packed
from qkv.parts import (
    Attention,
    Block,
    Branch,
    Classifier,
    Experts,
    FeedForward,
    Gated,
    Head,
    Learned,
    Mamba,
    Relative,
    RMSNorm,
    Rotary,
    Stack,
    TiedTokens,
    Tokens,
)
from tests.parts.helpers import seeded, wild

VOCAB, WIDTH = 29, 64
NORM = RMSNorm()


def block(ffn: Any = None) -> Block:
    attn = Attention(4, kv_heads=2, position=Rotary())
    return Block(attn=Branch(attn, pre=NORM), ffn=Branch(ffn or Gated(96), pre=NORM))


def decoder(one: Block, tied: bool = False, at: Any = None) -> Sequence:
    return Sequence(
        WIDTH, embed=Tokens(VOCAB, position=at), stack=Stack(one, depth=2), norm=NORM, head=Head(tied=tied, bias=True)
    )


SPECS = {
    "tied": decoder(block(), tied=True),
    "untied": decoder(block(FeedForward(96)), at=Learned(40)),
    "experts": decoder(block(Experts(32, count=4))),
    "mamba": decoder(Block(mix=Branch(Mamba(), pre=NORM)), tied=True),
    "shared": Sequence(
        WIDTH,
        embed=Tokens(VOCAB, width=32),
        stack=Stack(block(), depth=2, use=(0, 0)),
        mask=Full(),
        head=Classifier(("yes", "no")),
    ),
    "pair": EncoderDecoder(
        WIDTH,
        source=Tokens(VOCAB),
        target=TiedTokens(position=Learned(40)),
        encoder=Stack(block(), depth=1),
        decoder=Stack(
            Block(
                attn=Branch(Attention(4, position=Relative())),
                read=Branch(Attention(4, over="memory")),
                ffn=Branch(FeedForward(96)),
            ),
            depth=1,
        ),
        head=Head(tied=True),
    ),
}


def model(name: str = "tied", std: float = 0.1) -> Module:
    made = wild(SPECS[name].build(), std=std).float().eval()
    assert isinstance(made, Module)
    return made


def ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (rows, length), generator=seeded(3))


@torch.no_grad()
def answer(made: Module) -> Tensor:
    return made(ids(), **made.encode(ids())) if isinstance(made.spec, EncoderDecoder) else made(ids())


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def packed(made: Module) -> dict[str, Packed]:
    return {name: x for name, x in made.state_dict().items() if isinstance(x, Packed)}


def cost(format: str, weight: Tensor, found: Tensor) -> None:
    """Every block is as near as rounding by its ends would bring it, in fp64."""
    w, e = (x.double().view(-1, 32) for x in (weight, found - weight))
    half = w.abs().amax(1) / 254 if format == "Q8_0" else (w.amax(1) - w.amin(1)) / 30
    assert (e.square().mean(1).sqrt() <= half + w.abs().amax(1) * 2**-10).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", SPECS)
def test_matrices_are_packed_and_compute_as_what_they_stand_for(name: str, kind: str) -> None:
    made = model(name)
    before, expected = {key: x.clone() for key, x in made.state_dict().items()}, answer(made)
    size = sum(x.numel() * x.element_size() for x in made.parameters())
    done = quantise(made, kind)
    after = made.state_dict()
    assert list(after) == list(before) and all(after[key].shape == x.shape for key, x in before.items())
    assert done.formats == {key: x.format for key, x in packed(made).items()} and done.formats
    assert done.before == size and done.after < size * {"int8": 0.45, "int4": 0.4, "bf16": 0.6}[kind]
    for key, x in before.items():
        if key not in done.formats:
            assert torch.equal(after[key], x)
            continue
        table = key.endswith("tokens.weight") or key == "head.weight"
        format = {"int8": "Q8_0", "int4": "Q8_0" if table else "Q4_1", "bf16": "BF16"}[kind]
        assert done.formats[key] == format
        read = gguf.dequantize(after[key].blocks.numpy(), gguf.GGMLQuantizationType[format])
        plain = torch.from_numpy(read).view(x.shape)
        assert torch.equal(after[key].dequantise(), plain)
        assert torch.equal(plain, x.bfloat16().float()) if kind == "bf16" else cost(format, x, plain) is None
    plain = copy.deepcopy(made)
    dequantise(plain)
    assert not packed(plain) and all(type(x) is nn.Parameter for x in plain.parameters())
    assert relative(answer(made), answer(plain)) < 1e-5
    assert 0 < relative(answer(made), expected) < {"int8": 0.05, "int4": 0.6, "bf16": 0.05}[kind]


def test_a_channel_has_one_scale() -> None:
    made, groups = model("experts"), model("experts")
    before = {key: x.clone() for key, x in made.state_dict().items()}
    expected = answer(made)
    done = quantise(made, "int8-channel")
    assert done == quantise(groups, "int8") and set(done.formats.values()) == {"Q8_0"}
    for key, x in packed(made).items():
        half = before[key].double().abs().amax(-1, keepdim=True) / 254
        assert ((x.dequantise() - before[key]).abs() <= half * (1 + 127 * 2**-9)).all()  # and 16 bits of the scale
        scales = x.blocks.view(*x.blocks.shape[:-1], -1, 34)[..., :2]
        assert (scales == scales[..., :1, :]).all()
    assert relative(answer(groups), expected) < relative(answer(made), expected) < 0.1


def test_what_stays() -> None:
    done = quantise(made := model("untied"), "int8")
    left = [name for name, x in made.named_parameters() if not isinstance(x, Packed)]
    assert left and not done.unfit
    assert all(name.endswith(("norm.weight", ".pre.weight", ".bias", "position.weight")) for name in left)
    quantise(made := model("experts"), "int4")
    left = [name for name, x in made.named_parameters() if not isinstance(x, Packed)]
    assert all(name.endswith(("norm.weight", ".pre.weight", "head.bias", "router.score.weight")) for name in left)
    assert {"stack.0.ffn.f.gate", "stack.1.ffn.f.down"} <= packed(made).keys()
    quantise(made := model("shared"), "int4")
    assert not isinstance(made.head.out.weight, Packed)  # it decides
    done = quantise(made := model("mamba"), "int8")
    assert done.unfit == {f"stack.{n}.mix.f.dt_up.weight": 4 for n in range(2)}  # dt comes from so few numbers
    assert not isinstance(made.stack.layer(0).mix.f.dt_up.weight, Packed)


def test_weights_that_are_shared_stay_so() -> None:
    made = model("pair")
    before = made.count()
    assert quantise(made, "int4").formats["source.tokens.weight"] == "Q8_0"
    assert made.count() == before and made.target.table is made.source.tokens.weight
    made = model("untied")
    made.head.weight = made.embed.tokens.weight
    quantise(made, "int8")
    assert isinstance(made.head.weight, Packed) and made.head.weight is made.embed.tokens.weight
    dequantise(made)
    assert type(made.head.weight) is nn.Parameter and made.head.weight is made.embed.tokens.weight


@pytest.mark.parametrize("keep", ["stack.0.**", ["**.{q,k}", "embed.tokens.weight"]])
def test_some_can_be_kept(keep: Any) -> None:
    every, some = quantise(model(), "int8").formats, quantise(made := model(), "int8", keep=keep).formats
    kept = every.keys() - some.keys()
    if keep == "stack.0.**":
        assert kept == {name for name in every if name.startswith("stack.0.")}
    else:
        assert kept == {name for name in every if name.endswith((".q.weight", ".k.weight"))} | {"embed.tokens.weight"}
    assert packed(made).keys() == some.keys()


def test_what_has_as_few_bits_stays() -> None:
    made = model()
    first = quantise(made, "int4")
    blocks = {name: x.blocks for name, x in packed(made).items()}
    again = quantise(made, "int8")
    assert not again.formats and again.before == again.after == first.after
    assert all(x.blocks is blocks[name] or torch.equal(x.blocks, blocks[name]) for name, x in packed(made).items())
    made = model()
    quantise(made, "int8")
    assert set(quantise(made, "int4").formats.values()) == {"Q4_1"}  # all but the table, rounded a second time


def test_one_weight_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model()
    old = [weakref.ref(x) for x in made.parameters() if x.dim() == 2]
    alive: list[int] = []
    module: Any = sys.modules["qkv.adapt.quantise"]
    real = module.fit

    def spied(*arguments: Any) -> Tensor:
        alive.append(sum(x() is not None for x in old))
        return real(*arguments)

    monkeypatch.setattr(module, "fit", spied)
    quantise(made, "int8")
    assert len(alive) == len(old) and alive[-1] <= 2  # the one in hand, and the one that was looked at last


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_of_another_dtype_computes_in_it(dtype: torch.dtype) -> None:
    made = model().to(dtype)
    quantise(made, "int8")
    assert answer(made).dtype == dtype and {x.dtype for x in made.parameters()} == {dtype}
    assert not quantise(model().bfloat16(), "bf16").formats  # as few bits


def test_what_cannot_be_is_said_and_leaves_the_model() -> None:
    made = model()
    before = {name: x.clone() for name, x in made.state_dict().items()}
    with pytest.raises(QkvError, match="quantised to int8, int8-channel, int4, bf16, not to 'int5'; did you mean"):
        quantise(made, "int5")
    with pytest.raises(QkvError, match=r"no weight that could be packed matches '\*\*.quey'"):
        quantise(made, "int8", keep="**.quey")
    assert all(torch.equal(x, before[name]) for name, x in made.state_dict().items()) and not packed(made)
    for value in (float("nan"), float("inf"), 1e5):
        with torch.no_grad():
            made.stack.layer(1).ffn.f.down.weight[3, 5] = value
        with pytest.raises(QkvError, match=r"stack.1.ffn.f.down.weight holds a weight that is not finite, or above"):
            quantise(made, "int4")
        assert not packed(made)


def test_rows_that_blocks_do_not_fit_are_listed() -> None:
    made = wild(decoder(block(FeedForward(50)), tied=True).build()).float().eval()
    done = quantise(made, "int4")
    assert done.unfit == {f"stack.{n}.ffn.f.down.weight": 50 for n in range(2)} and len(done.formats) == 11
    assert type(made.stack.layer(0).ffn.f.down.weight) is nn.Parameter


# --- learning ---


@pytest.mark.parametrize("name", ["tied", "experts"])
def test_adapters_learn_beside_packed_weights(name: str) -> None:
    made = model(name)
    quantise(made, "int4")
    plain = copy.deepcopy(made)
    dequantise(plain)
    gradients, losses = [], []
    for one in (made, plain):
        one.train()
        torch.manual_seed(0)
        add_lora(one, "a", rank=2, alpha=4, targets=("**.attn.f.{q,v}", "**.attn.f.o"))
        learning = [x for x in one.parameters() if x.requires_grad]
        optimizer = torch.optim.SGD(learning, 0.05)
        for _ in range(3):
            x = one.hidden(ids())
            loss = one.loss(x[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        gradients.append([x.grad for x in learning])
        one.eval()
    assert losses[2] < losses[0] and max(abs(a - b) for a, b in zip(losses[:3], losses[3:], strict=True)) < 1e-3
    assert all(relative(a, b) < 1e-3 for a, b in zip(*gradients, strict=True))
    assert relative(answer(made), answer(plain)) < 1e-4
    assert loras(made, "a").keys() == loras(plain, "a").keys()
    with pytest.raises(QkvError, match="keeps its weight packed"):
        merge(made, "a")


@pytest.mark.parametrize("part", ["head", "layer"])
def test_packed_weights_themselves_do_not_learn(part: str) -> None:
    made = model("untied").train()
    quantise(made, "int8", keep=() if part == "head" else ("head", "embed.tokens"))
    x = made.hidden(ids()).flatten(0, 1)
    with pytest.raises(QkvError, match="cannot be trained: load the model dequantised, or freeze them and train"):
        made.loss(x, ids().flatten()).backward()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_the_loss_is_that_of_the_plain_weights(name: str) -> None:
    made = model(name)
    quantise(made, "int8")
    plain = copy.deepcopy(made)
    dequantise(plain)
    x = torch.randn(7, WIDTH, generator=seeded(5))
    labels = torch.arange(7)
    with torch.no_grad():
        assert abs(float(made.loss(x, labels, 0.1)) - float(plain.loss(x, labels, 0.1))) < 1e-3
    found = []
    for one in (made, plain):
        one.requires_grad_(False)
        y = x.clone().requires_grad_()
        one.loss(y, labels, 0.1).backward()
        found.append(y.grad)
    assert relative(found[0], found[1]) < 1e-5


# --- decoding ---


@pytest.mark.parametrize("name", ["tied", "experts", "mamba"])
def test_steps_are_the_whole(name: str) -> None:
    made = model(name)
    quantise(made, "int4")
    with torch.no_grad():
        state, whole = made.new_state(3, 9), made(ids())
        steps = [made(ids()[:, a:b], state=state) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert relative(torch.cat(steps, 1), whole) < 1e-4
