"""LoRA beside the layers of a model, learning, and inside its weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qkv.adapt import LoRA, add_lora, lora_state, loras, merge, remove_lora, train_only, unmerge
from qkv.errors import QkvError
from qkv.models import Module, Sequence
from qkv.parts import Attention, Block, Branch, FeedForward, Head, Linear, RMSNorm, Stack, Tokens
from tests.parts.helpers import seeded, wild

VOCAB, WIDTH = 23, 12
TARGETS = "**.attn.f.{q,v}", "**.ffn.f.down"


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def model(use: tuple[int, ...] | None = None) -> Module:
    """A tied decoder in fp64 and evaluation mode, its weights all random."""
    block = Block(attn=Branch(Attention(2), pre=RMSNorm()), ffn=Branch(FeedForward(20), pre=RMSNorm()))
    spec = Sequence(width=WIDTH, embed=Tokens(VOCAB), stack=Stack(block, depth=3, use=use), head=Head(tied=True))
    made = wild(spec.build(), std=0.3).eval()
    assert isinstance(made, Module)
    return made


def adapted(name: str, base: Module, rank: int = 3, seed: int = 0) -> dict[str, LoRA]:
    """An adapter with random matrices."""
    add_lora(base, name, rank=rank, alpha=5, targets=TARGETS)
    made = loras(base, name)
    for lora in made.values():
        for n, matrix in enumerate(lora.parameters()):
            nn.init.normal_(matrix, std=0.3, generator=seeded(seed + n))
    return made


def ids() -> Tensor:
    return torch.randint(VOCAB, (4, 9), generator=seeded(3))


@pytest.mark.parametrize(("stabilised", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_it_is_two_thin_products(stabilised: bool, scale: float) -> None:
    A, B, x = (torch.randn(shape, dtype=torch.float64, generator=seeded()) for shape in ((4, 7), (5, 4), (2, 3, 7)))
    lora = LoRA(A, B, 16, stabilised=stabilised)
    assert lora.scale == scale
    torch.testing.assert_close(lora(x), torch.einsum("or,rc,btc->bto", B, A, x) * scale)
    torch.testing.assert_close(lora.product(), scale * B @ A)


def test_dropout_falls_on_what_comes_in_and_in_training_alone() -> None:
    lora = LoRA(torch.eye(1000), torch.eye(1000), 1000, dropout=0.25)
    x = torch.ones(4, 1000)
    assert torch.equal(lora.eval()(x), x)
    y = lora.train()(x)
    assert abs((y == 0).double().mean() - 0.25) < 0.03
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 4 / 3))


def test_beside_narrow_weights_it_is_fp32_and_gives_back_their_type() -> None:
    layer = nn.ModuleDict({"one": Linear(6, 4)}).bfloat16()
    add_lora(layer, "default", rank=2, alpha=2, targets="one")
    assert {x.dtype for x in lora_state(layer, "default").values()} == {torch.float32}
    assert layer["one"](torch.ones(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer["one"](torch.ones(3, 6)).dtype == torch.bfloat16


def test_a_fresh_one_changes_nothing_and_stands_where_it_should() -> None:
    base = model()
    before, names = base(ids()), set(base.state_dict())
    paths = add_lora(base, "default", rank=3, alpha=6, targets=TARGETS)
    wanted = [f"stack.{n}.{tail}" for n in range(3) for tail in ("attn.f.q", "attn.f.v", "ffn.f.down")]
    assert sorted(paths) == sorted(wanted)
    assert torch.equal(base(ids()), before)
    added = {f"{path}.adapters.default.{letter}" for path in wanted for letter in "AB"}
    assert set(base.state_dict()) == names | added
    assert {name for name, parameter in base.named_parameters() if parameter.requires_grad} == added
    assert set(lora_state(base, "default")) == {f"{path}.{letter}" for path in wanted for letter in "AB"}
    assert not any(lora.training for lora in loras(base, "default").values())
    remove_lora(base, "default")
    assert set(base.state_dict()) == names


@pytest.mark.parametrize("recompute", [False, True])
def test_only_it_learns_and_it_does(recompute: bool) -> None:
    torch.manual_seed(0)
    base = model().float().train().recompute(recompute)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    add_lora(base, "default", rank=4, alpha=8, targets="**.f.*")
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(30):
        loss = base.loss(base.hidden(ids()[:, :-1]).flatten(0, 1), ids()[:, 1:].flatten()) / ids()[:, 1:].numel()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in base.named_parameters():
            assert (parameter.grad is not None) == (".adapters.default." in name), name
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in before.items())


def test_merged_is_unmerged_and_back_bit_for_bit() -> None:
    base = model().float()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted("one", base, rank=3)
    one = base(ids())
    adapted("two", base, rank=5, seed=9)
    both = base(ids())
    assert relative(one, both) > 0.1
    merged = merge(base, "one", "two")
    assert set(base.state_dict()) == set(weights)
    assert relative(base(ids()), both) < 1e-5
    unmerge(base, merged)
    assert torch.equal(base(ids()), both)
    first = merge(base, "two")
    second = merge(base)
    assert relative(base(ids()), both) < 1e-5
    with pytest.raises(QkvError, match="undo later merges first"):
        unmerge(base, first)
    unmerge(base, second)
    unmerge(base, first)
    remove_lora(base, "two")
    torch.testing.assert_close(base(ids()), one)
    remove_lora(base, "one")
    assert base.state_dict().keys() == weights.keys()
    assert all(torch.equal(base.state_dict()[name], tensor) for name, tensor in weights.items())


def test_shared_layers_share_it_and_a_shared_weight_is_left_alone() -> None:
    base = model(use=(0, 1, 0))
    assert len(adapted("one", base)) == 6
    before = base(ids())
    merge(base)
    torch.testing.assert_close(base(ids()), before)
    table, head = nn.Embedding(5, 3), Linear(3, 5)
    table.weight = head.weight
    tied, rows = nn.ModuleDict({"table": table, "head": head}), table.weight.detach().clone()
    add_lora(tied, "one", rank=2, alpha=2, targets="head")
    nn.init.normal_(loras(tied, "one")["head"].B, generator=seeded())
    x = torch.randn(4, 3, generator=seeded())
    beside = tied["head"](x)
    merged = merge(tied)
    torch.testing.assert_close(tied["head"](x), beside)
    assert torch.equal(table.weight, rows)
    unmerge(tied, merged)
    assert head.weight is table.weight


class Packed(torch.Tensor):
    """A stand-in for a weight store."""


def test_a_packed_weight_is_not_merged_into() -> None:
    base = model()
    made = adapted("one", base)
    layer = base.get_submodule("stack.1.ffn.f.down")
    assert isinstance(layer, Linear)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    before = base(ids())
    with pytest.raises(QkvError, match=r"stack.1.ffn.f.down keeps its weight packed \(Packed"):
        merge(base)
    assert loras(base, "one").keys() == made.keys()
    assert torch.equal(base(ids()), before)


def test_several_may_learn_together() -> None:
    base = model()
    adapted("one", base)
    adapted("two", base)
    learning = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    assert learning and all(".adapters.two." in name for name in learning)
    train_only(base, "one", "two")
    assert sum(parameter.requires_grad for parameter in base.parameters()) == 2 * len(learning)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: add_lora(m, "b", rank=2, alpha=2, targets="**.query"), r"no Linear .* matches '\*\*.query'"),
        (lambda m: add_lora(m, "b", rank=2, alpha=2, targets="**.f.{q,w}"), r"no Linear .* matches '\*\*.f.w'"),
        (lambda m: add_lora(m, "a", rank=2, alpha=2, targets="**.f.k"), "has an adapter 'a' already"),
        (lambda m: add_lora(m, "a.b", rank=2, alpha=2, targets="**.f.q"), "without a dot"),
        (lambda m: add_lora(m, "keys", rank=2, alpha=2, targets="**.f.q"), "cannot be called 'keys'"),
        (lambda m: add_lora(m, "b", rank=0, alpha=2, targets="**.f.q"), "at least 1"),
        (lambda m: add_lora(m, "b", rank=10**9, alpha=2, targets="**.f.q"), "rank 1000000000 is more than stack.0"),
        (lambda m: remove_lora(m, "aa"), "no LoRA is called 'aa'; did you mean 'a'"),
        (lambda m: merge(m, "a", "c"), "no LoRA is called 'c'"),
    ],
)
def test_mistakes_change_nothing(call: Callable[[Module], object], said: str) -> None:
    base = model()
    adapted("a", base)
    before, learning = base.state_dict(), [p.requires_grad for p in base.parameters()]
    with pytest.raises(QkvError, match=said):
        call(base)
    assert base.state_dict().keys() == before.keys()
    assert [p.requires_grad for p in base.parameters()] == learning
