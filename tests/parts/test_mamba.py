"""Mamba and Mamba-2 against the transformers package, and the short convolution against torch's own."""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, Mamba2Config, MambaConfig, PretrainedConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from qkv.context import Context
from qkv.errors import QkvError
from qkv.masks import Causal, Same
from qkv.parts import BatchNorm, Mamba, Mamba2, Mixer, RMSNorm
from qkv.parts.convolution import ShortConvolution
from qkv.parts.mixers import Body
from qkv.state import Recurrent
from tests.parts.helpers import run, seeded, wild

C, T = 20, 37
FIRST = {
    "in_proj": ["x", "z"], "conv1d": ["x_conv"], "x_proj": ["dt_down", "B", "C"], "out_proj": ["out"],
    "dt_proj.weight": ["dt_up.weight"], "dt_proj.bias": ["dt_bias"], "A_log": ["A_log"], "D": ["D"],
}  # fmt: skip
SECOND = {
    "in_proj": ["z", "x", "B", "C", "dt"], "conv1d": ["x_conv", "B_conv", "C_conv"], "norm": ["norm"],
    "out_proj": ["out"], "dt_bias": ["dt_bias"], "A_log": ["A_log"], "D": ["D"],
}  # fmt: skip


@dataclass
class Pair:
    """One mixer here and there; `table` says which of our tensors make up the rows of each of theirs."""

    spec: Mixer
    config: PretrainedConfig

    @cached_property
    def table(self) -> dict[str, list[str]]:
        return FIRST if isinstance(self.spec, Mamba) else SECOND

    def rows(self, ours: dict[str, Tensor], name: str) -> Tensor:
        part, kind = name.split(".")[0], name[len(name.split(".")[0]) :]
        return torch.cat([ours[n] if n in ours else ours[n + kind] for n in self.table.get(name) or self.table[part]])

    def build(self) -> tuple[Body, nn.Module]:
        """Both, with the same random weights."""
        ours, theirs = self.spec.build(C), (MambaMixer if self.table is FIRST else Mamba2Mixer)(self.config, 0)
        source = seeded(3)
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=0.3, generator=source)
        own = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
        theirs.load_state_dict({name: self.rows(own, name).view(p.shape) for name, p in theirs.named_parameters()})
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
        return ours, theirs.eval()


def first(bias: bool, conv_bias: bool) -> Pair:
    config = MambaConfig(
        hidden_size=C, expand=3, state_size=5, time_step_rank=3, conv_kernel=3, use_bias=bias, use_conv_bias=conv_bias,
        num_hidden_layers=1,
    )  # fmt: skip
    return Pair(Mamba(3 * C, state=5, rank=3, conv=3, bias=bias, conv_bias=conv_bias), config)


def second(bias: bool, groups: int, limit: tuple[float, float] | None) -> Pair:
    config = Mamba2Config(
        hidden_size=C, expand=3, num_heads=6, head_dim=10, n_groups=groups, state_size=5, conv_kernel=3, use_bias=bias,
        time_step_limit=limit or (0.0, float("inf")), chunk_size=16, layer_norm_epsilon=0.01, num_hidden_layers=1,
    )  # fmt: skip
    return Pair(Mamba2(6, head_width=10, groups=groups, state=5, conv=3, bias=bias, step_limit=limit, eps=0.01), config)


PAIRS = {
    "mamba": first(False, True),
    "mamba with a bias": first(True, False),
    "mamba2": second(False, 1, None),
    "mamba2 in groups": second(True, 3, (0.3, 0.8)),
}
each = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def feed(body: Body, x: Tensor, cell: Recurrent, lengths: Tensor | None = None) -> Tensor:
    context = Context(torch.arange(x.shape[1])[None], Causal(), None, lengths)
    body.view, context.views = 0, [body.prepare(context, cell, x.shape[1])]
    return body(x, context, cell)


@each
def test_outputs_and_gradients_are_those_of_the_reference(pair):
    ours, theirs = pair.build()
    weight, inputs = tokens(3, T, C, seed=2), [tokens(3, T, C).requires_grad_() for _ in range(2)]
    outs = [run(ours, inputs[0], Causal()), theirs(inputs[1])]
    for out in outs:
        (out * weight).sum().backward()
    close(*outs)
    close(inputs[0].grad, inputs[1].grad)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        close(pair.rows(gradients, name).view(parameter.shape), parameter.grad)


@torch.no_grad()
@pytest.mark.parametrize(("name", "cuts"), [("mamba2", [20, 1, 16]), ("mamba2 in groups", [20, 17])])
def test_later_chunks_are_those_of_the_reference(name, cuts):
    """Where it has any: the first's forgets its state when fed several tokens, the second's its step limit for one."""
    ours, theirs = PAIRS[name].build()
    x, cell, cache = tokens(2, T, C), ours.new_cell(2, T, {}), DynamicCache(config=PAIRS[name].config)
    for piece in x.split(cuts, 1):
        close(feed(ours, piece, cell), theirs(piece, cache_params=cache))


@torch.no_grad()
@each
def test_padding_neither_decays_nor_writes(pair):
    ours, _ = pair.build()
    x, lengths, cell = tokens(4, T, C), torch.tensor([T, 11, 1, 0]), ours.new_cell(4, T, {})
    x[1, 11:], x[2, 1:], x[3] = 1e3, -1e3, 1e3
    out = [feed(ours, x[:, :9], cell, lengths.clamp(max=9)), feed(ours, x[:, 9:], cell, (lengths - 9).clamp(min=0))]
    assert torch.cat(out, 1).isfinite().all()
    for row, n in enumerate(lengths.tolist()):
        alone = ours.new_cell(1, T, {})
        if n:
            torch.testing.assert_close(torch.cat(out, 1)[row, :n], feed(ours, x[row : row + 1, :n], alone)[0])
        for name, value in alone.tensors().items():
            torch.testing.assert_close(cell.now[name][row], value[0])


@pytest.mark.parametrize("spec", [Mamba(24, state=5, conv=3, norm=RMSNorm()), Mamba2(4, groups=2, state=5)], ids=str)
def test_documents_in_one_row_are_as_if_alone(spec):
    body, lengths = wild(spec.build(C), 0.3), [1, 66, 20, 2]
    x = tokens(2, sum(lengths), C).double().requires_grad_()
    given = {"segments": torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(2, -1)}
    found = run(body, x, Causal() & Same(), given=given)
    torch.testing.assert_close(found, torch.cat([run(body, y, Causal()) for y in x.split(lengths, 1)], 1))
    (gradient,) = torch.autograd.grad(found[:, 67:87].sum(), x)
    assert gradient.isfinite().all()
    assert gradient[:, 67:87].any()
    assert not gradient[:, :67].any()
    assert not gradient[:, 87:].any()


@torch.no_grad()
@pytest.mark.parametrize("spec", [Mamba(24, state=5, conv=3), Mamba2(4, groups=2, state=5)], ids=str)
def test_padding_of_another_document_forgets_nothing(spec):
    body, x = wild(spec.build(C), 0.3), tokens(1, T, C).double()
    cell, alone = body.new_cell(1, T, {}), body.new_cell(1, T, {})
    feed(body, x[:, :20], alone)
    given = {"segments": (torch.arange(T) >= 20).long()[None]}
    context = Context(torch.arange(T)[None], Causal() & Same(), None, torch.tensor([20]), given=given)
    body.view, context.views = 0, [body.prepare(context, cell, T)]
    body(x, context, cell)
    for name, value in alone.now.items():
        torch.testing.assert_close(cell.now[name], value)


@torch.no_grad()
@each
def test_in_half_precision_the_state_stays_single(pair):
    ours, _ = pair.build()
    whole, half = run(ours, tokens(2, T, C)), run(ours.bfloat16(), tokens(2, T, C).bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()
    cell = ours.new_cell(2, T, {})
    feed(ours, tokens(2, T, C).bfloat16(), cell)
    assert cell.now["h" if "h" in cell.now else "S"].dtype == torch.float32


@each
def test_autocast_leaves_the_recurrence_alone(pair):
    ours, _ = pair.build()
    whole = run(ours, tokens(2, T, C))
    with torch.autocast("cpu", torch.bfloat16):
        half = run(ours, tokens(2, T, C))
    assert (half - whole).abs().max() < 0.05 * whole.abs().max()
    half.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters())


@pytest.mark.parametrize("spec", [Mamba(), Mamba2(4), Mamba2(4, rates=(0.25, 0.5))], ids=str)
def test_fresh_channels_remember_ten_to_a_thousand_tokens(spec):
    torch.manual_seed(0)
    body = spec.build(32)
    assert body.out.weight.shape == (32, 64)
    step = F.softplus(body.dt_bias.detach())
    assert step.min() >= 0.9e-3
    assert step.max() <= 0.11
    if isinstance(spec, Mamba):
        assert body.dt_up.weight.shape == (64, 2)
        torch.testing.assert_close(body.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    else:
        least, most = spec.rates
        assert least - 1e-6 <= body.A_log.exp().min() <= body.A_log.exp().max() <= most + 1e-6
    assert torch.equal(body.D, torch.ones_like(body.D))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_a_short_convolution_is_torch_s_with_nothing_before(size, bias):
    conv = wild(ShortConvolution(6, size, bias=bias))
    x = torch.randn(3, 9, 6, dtype=torch.float64, generator=seeded())
    expected = F.conv1d(F.pad(x.mT, (size - 1, 0)), conv.weight[:, None], conv.bias, groups=6).mT
    torch.testing.assert_close(conv(x).out, expected)
    begun = conv(x[:, :2])
    torch.testing.assert_close(conv(x[:, 2:], begun.taps).out, expected[:, 2:])
    ragged = conv(x[:, :5], lengths=torch.tensor([5, 2, 0])).taps
    torch.testing.assert_close(ragged[1], begun.taps[1])
    assert not ragged[2].any()
    assert ragged.shape == conv.no_taps(3).shape == (3, size - 1, 6)


@pytest.mark.parametrize(
    ("part", "options"),
    [
        (Mamba, {"inner": 0}),
        (Mamba, {"conv": 0}),
        (Mamba, {"rank": -1}),
        (Mamba, {"norm": BatchNorm()}),
        (Mamba2, {"heads": 0}),
        (Mamba2, {"heads": 4, "head_width": 0}),
        (Mamba2, {"heads": 4, "groups": 3}),
        (Mamba2, {"heads": 4, "step_limit": (1.0, 0.5)}),
        (Mamba2, {"heads": 4, "rates": (0.0, 1.0)}),
        (Mamba2, {"heads": 4, "rates": (2.0, 1.0)}),
        (Mamba2, {"heads": 3}),  # of 2 × 20
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(part, options):
    with pytest.raises(QkvError, match=r"at least 1|do not divide|step_limit|rates are|over the batch"):
        part(**options).build(C)
