"""Memories against the papers' own formulas in fp64, and against the transformers package where it has them."""

import dataclasses as dc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import KimiLinearConfig, Qwen3NextConfig, xLSTMConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from qkv.context import Context, Tap
from qkv.errors import QkvError
from qkv.masks import Causal, Same
from qkv.parts import (
    GLA,
    HGRN2,
    KDA,
    MLSTM,
    Add,
    ALiBi,
    Attention,
    BatchNorm,
    Block,
    Branch,
    Delta,
    Exponential,
    GatedDeltaNet,
    Memory,
    PerChannel,
    PerHead,
    PerToken,
    Positive,
    Retention,
    RMSNorm,
    Rotary,
    Stack,
    StepSize,
    Tied,
    Unit,
)
from qkv.parts.mixers import Body
from qkv.parts.mixers.memory import Decay, System
from qkv.spec import KINDS, Spec, dump, edit, kinds, load
from qkv.state import Recurrent
from tests.parts.helpers import run, seeded, wild

C, H, T = 24, 2, 37
SYSTEMS = {kind: KINDS[kind](heads=H) for kind in kinds(System)}
each = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)


def tokens(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def heads(x: Tensor, linear: nn.Module) -> Tensor:
    """B T C → B H T K."""
    return (x @ linear.weight.T).unflatten(-1, (H, -1)).transpose(1, 2)


# --- the papers' formulas, head by head; o is B H T V ---


def linear_attention(body: Body, x: Tensor) -> Tensor:
    """Katharopoulos 2020, eq. 9: a mean, weighted by the features' similarity."""
    q, k = (F.elu(heads(x, w)) + 1 for w in (body.q, body.k))
    similar = (q @ k.mT).tril()
    return (similar @ heads(x, body.v)) / similar.sum(-1, keepdim=True)


def retention(body: Body, x: Tensor) -> Tensor:
    """Sun 2023, eq. 5: (Q Kᵀ ⊙ D) V, Q and K turned as complex numbers."""
    q, k, v = (heads(x, w) for w in (body.q, body.k, body.v))
    n, K = torch.arange(x.shape[1], dtype=x.dtype), q.shape[-1]
    theta = 10000.0 ** -torch.linspace(0, 1, K // 2, dtype=x.dtype)
    turn = torch.polar(torch.ones(1, dtype=x.dtype), n[:, None] * theta)
    q, k = (torch.complex(*y.chunk(2, -1)) * turn for y in (q, k))
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=x.dtype))
    D = (gamma[:, None, None] ** (n[:, None] - n)).tril()
    return ((q @ k.mH).real / K**0.5 * D) @ v


def gated_retention(body: Body, x: Tensor) -> Tensor:
    """Sun 2024, eq. 6: D from the products of the tokens' own γ; turned as any rotary query."""
    q, k, v = (heads(x, w) for w in (body.q, body.k, body.v))
    n, K = torch.arange(x.shape[1], dtype=x.dtype), q.shape[-1]
    theta = 10000.0 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K)
    turn = torch.polar(torch.ones(1, dtype=x.dtype), n[:, None] * theta)
    q, k = (torch.complex(*y.chunk(2, -1)) * turn for y in (q, k))
    gamma = ((x @ body.decay.gate.up.weight.T + body.decay.gate.bias).sigmoid() ** (1 / 16)).mT
    b = gamma.cumprod(-1)
    return ((q @ k.mH).real / K**0.5 * (b[..., :, None] / b[..., None, :]).tril()) @ v


def gla(body: Body, x: Tensor) -> Tensor:
    """Yang 2023, eq. 4: ((Q ⊙ B)(K / B)ᵀ ⊙ M) V with B the products of all gates so far."""
    q, k, v = (heads(x, w) for w in (body.q, body.k, body.v))
    gate = body.decay.gate
    alpha = (x @ gate.down.weight.T @ gate.up.weight.T + gate.bias).sigmoid() ** (1 / 16)
    B = alpha.unflatten(-1, (H, -1)).transpose(1, 2).cumprod(-2)
    return ((q * B) @ (k / B).mT).tril() @ v / q.shape[-1] ** 0.5


def steps(S: Callable[[int, Tensor], Tensor], q: Tensor, v: Tensor) -> Tensor:
    """o_t = S_t q_t with S_t = S(t, S_{t−1}), V × K as most papers have it."""
    now, out = v.new_zeros(*v.shape[:2], v.shape[-1], q.shape[-1]), []
    for t in range(v.shape[2]):
        now = S(t, now)
        out.append(now @ q[:, :, t, :, None])
    return torch.stack(out, 2)[..., 0]


def hgrn2(body: Body, x: Tensor) -> Tensor:
    """Qin 2024, eq. 7: h_t = h_{t−1} diag(f_t) + i_t ⊗ (1 − f_t)."""
    q, f, v = F.silu(heads(x, body.q)), heads(x, body.decay.gate.up).sigmoid(), heads(x, body.v)
    f = body.spec.decay.floor + (1 - body.spec.decay.floor) * f
    out = steps(lambda t, S: S * f[:, :, t, None] + v[:, :, t, :, None] * (1 - f)[:, :, t, None], q, v)
    return out / q.shape[-1] ** 0.5


def mlstm(body: Body, x: Tensor) -> Tensor:
    """Beck 2024, eqs. 19 to 22, without the stabiliser; gates capped as in the 7B model."""
    q, k, v = heads(x, body.q) / 6**0.5, heads(x, body.k), heads(x, body.v)
    i, f = (15 * torch.tanh((x @ g.up.weight.T + g.bias) / 15) for g in (body.rule.gate, body.decay.gate))
    i, f = i.exp().mT, f.sigmoid().mT
    v1 = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    write = (i[..., None] * v1)[..., None] * k[..., None, :]
    out = steps(lambda t, S: f[:, :, t, None, None] * S + write[:, :, t], q, v1)
    return out[..., :-1] / (out[..., -1:].abs().clamp(min=1))


def delta_net(body: Body, x: Tensor) -> Tensor:
    """Yang 2024, eq. 1: S_t = S_{t−1} − β (S_{t−1} k − v) kᵀ."""
    found = []
    for w, conv in ((body.q, body.q_conv), (body.k, body.k_conv), (body.v, body.v_conv)):
        y = F.conv1d(F.pad((x @ w.weight.T).mT, (3, 0)), conv.weight[:, None], groups=len(conv.weight)).mT
        found.append(F.silu(y).unflatten(-1, (H, -1)).transpose(1, 2))
    q, k, v = found
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = (x @ body.rule.rate.up.weight.T).sigmoid().mT[..., None, None]

    def S(t: int, S: Tensor) -> Tensor:
        key = k[:, :, t, :, None]
        return S - beta[:, :, t] * (S @ key - v[:, :, t, :, None]) @ key.mT

    return steps(S, q, v) / q.shape[-1] ** 0.5


FORMULAS = {
    "linear-attention": linear_attention, "retention": retention, "gated-retention": gated_retention, "gla": gla,
    "hgrn2": hgrn2, "mlstm": mlstm, "delta-net": delta_net,
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_each_system_is_its_paper_s_formula(name):
    spec = HGRN2(H, floor=0.3) if name == "hgrn2" else SYSTEMS[name]
    body = wild(spec.build(C), 0.3)
    x = tokens(3, T, C)
    y = FORMULAS[name](body, x).transpose(1, 2)
    y = (y if body.norm is None else body.norm(y)).flatten(2)
    if body.gate is not None:
        gate = x @ body.gate.up.weight.T
        y = y * {"silu": F.silu, "sigmoid": torch.sigmoid}[body.spec.gate](gate)
    torch.testing.assert_close(run(body, x, Causal()), y @ body.o.weight.T, rtol=1e-5, atol=1e-8)


# --- the transformers package ---


def close(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def both(spec: Memory, theirs: nn.Module, table: dict[str, list[str]], order: Tensor | None = None) -> list[Body]:
    """The same random weights in both; `table` says which of ours are the rows of each of theirs."""
    ours, source = spec.build(C), seeded(3)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.3, generator=source)
    own = dict(ours.named_parameters())
    rows = {name: torch.cat([own[n].detach() for n in names]) for name, names in table.items()}
    if order is not None:
        rows["in_proj_qkvz.weight"] = rows["in_proj_qkvz.weight"][order]
    theirs.load_state_dict({name: rows[name].reshape(p.shape) for name, p in theirs.named_parameters()})
    assert {name for names in table.values() for name in names} == set(own)
    return [ours, theirs.eval()]


def compare(ours: Body, theirs: Callable[[Tensor], Tensor]) -> None:
    """Outputs and the gradient of the input."""
    weight, inputs = tokens(3, 70, C, seed=2).float(), [tokens(3, 70, C).float().requires_grad_() for _ in range(2)]
    outs = [run(ours, inputs[0], Causal()), theirs(inputs[1])]
    for out in outs:
        (out * weight).sum().backward()
    close(*outs)
    close(inputs[0].grad, inputs[1].grad)


CONVOLVED = {"conv1d.weight": ["q_conv.weight", "k_conv.weight", "v_conv.weight"], "o_proj.weight": ["o.weight"]}


def test_the_gated_delta_rule_in_groups_is_the_reference_s():
    config = Qwen3NextConfig(
        hidden_size=C, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6,
        linear_value_head_dim=10, linear_conv_kernel_dim=3, num_hidden_layers=1, rms_norm_eps=1e-3,
    )  # fmt: skip
    spec = Memory(
        4, groups=2, key_width=6, value_width=10, decay=StepSize(), rule=Delta(), feature=Unit(), conv=3,
        norm=RMSNorm(1e-3), gate="silu",
    )  # fmt: skip
    table = {
        "dt_bias": ["decay.step.bias"], "A_log": ["decay.A_log"], "norm.weight": ["norm.weight"],
        "in_proj_qkvz.weight": ["q.weight", "k.weight", "v.weight", "gate.up.weight"],
        "in_proj_ba.weight": ["rule.rate.up.weight", "decay.step.up.weight"],
        "conv1d.weight": CONVOLVED["conv1d.weight"], "out_proj.weight": ["o.weight"],
    }  # fmt: skip
    n = torch.arange(12 + 12 + 40 + 40)
    pieces = zip(*(y.chunk(2) for y in n.split([12, 12, 40, 40])), strict=True)
    order = torch.cat([torch.cat(piece) for piece in pieces])  # q, k, v and z of one group stand together
    ours, theirs = both(spec, Qwen3NextGatedDeltaNet(config, 0), table, order)
    with torch.no_grad():
        theirs.in_proj_ba.weight.copy_(theirs.in_proj_ba.weight[[0, 1, 4, 5, 2, 3, 6, 7]])
    compare(ours, theirs)


def test_kimi_delta_attention_is_the_reference_s():
    config = KimiLinearConfig(
        hidden_size=C, linear_num_heads=2, linear_head_dim=12, linear_conv_kernel_dim=4, num_hidden_layers=1,
        rms_norm_eps=1e-5,
    )  # fmt: skip
    table = {
        "q_proj.weight": ["q.weight"], "k_proj.weight": ["k.weight"], "v_proj.weight": ["v.weight"],
        "forget_gate.f_a_proj.weight": ["decay.step.down.weight"], "forget_gate.A_log": ["decay.A_log"],
        "forget_gate.f_b_proj.weight": ["decay.step.up.weight"], "forget_gate.dt_bias": ["decay.step.bias"],
        "b_proj.weight": ["rule.rate.up.weight"], "o_norm.weight": ["norm.weight"],
        "g_a_proj.weight": ["gate.down.weight"], "g_b_proj.weight": ["gate.up.weight"], **CONVOLVED,
    }  # fmt: skip
    compare(*both(KDA(2).memory(C), KimiLinearDeltaAttention(config, 0), table))


def test_the_stabilised_memory_is_the_reference_s():
    config = xLSTMConfig(hidden_size=C, num_heads=2, mode="train", autocast_kernel_dtype="float32", chunk_size=10)
    table = {
        "q.weight": ["q.weight"], "k.weight": ["k.weight"], "v.weight": ["v.weight"], "out_proj.weight": ["o.weight"],
        "ogate_preact.weight": ["gate.up.weight"], "igate_preact.weight": ["rule.gate.up.weight"],
        "igate_preact.bias": ["rule.gate.bias"], "fgate_preact.weight": ["decay.gate.up.weight"],
        "fgate_preact.bias": ["decay.gate.bias"], "multihead_norm.weight": ["norm.weight", "norm.weight"],
    }  # fmt: skip
    ours, theirs = both(MLSTM(2).memory(C), xLSTMLayer(config), table)
    compare(ours, lambda x: theirs(x)[0])


# --- what every memory does ---

SLOTS = {
    "constant decay": Memory(4, groups=2, decay=PerHead(), conv=2),
    "normalised": Memory(4, groups=2, rule=Add(normalise=True), feature=Positive()),
    "stabilised vector": Memory(4, groups=2, decay=PerChannel(4), rule=Exponential(), conv=4),
    "tied in groups": Memory(4, groups=2, decay=Tied(0.2), rule=Delta(2.0), feature=Unit()),
    "turned": Memory(2, groups=1, decay=PerToken(), rule=Delta(), feature=Unit(), position=Rotary()),
}
BODIES = {**SYSTEMS, **SLOTS}
every = pytest.mark.parametrize("spec", BODIES.values(), ids=BODIES)


@every
def test_documents_in_one_row_are_as_if_alone(spec):
    body, lengths = wild(spec.build(C), 0.3), [1, 66, 20, 2, 61]
    x = tokens(2, sum(lengths), C).requires_grad_()
    segments = torch.arange(5).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    found = run(body, x, Causal() & Same(), given={"segments": segments})
    alone = torch.cat([run(body, y, Causal()) for y in x.split(lengths, 1)], 1)
    # positions go on through a row, as attention's do, so that angles differ by rounding
    torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-7)
    (gradient,) = torch.autograd.grad(found[:, 87:89].square().sum(), x)
    assert gradient.isfinite().all()
    assert not gradient[:, :87].any()
    assert not gradient[:, 89:].any()


@torch.no_grad()
@every
def test_padding_may_hold_anything(spec):
    body, lengths = wild(spec.build(C), 0.3), torch.tensor([T, 11, 1, 0])
    x, cell = tokens(4, T, C), body.new_cell(4, T, {})
    x[1, 11:], x[2, 1:], x[3] = torch.nan, torch.inf, torch.nan
    feed(body, x, cell, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone = body.new_cell(1, T, {})
        if n:
            feed(body, x[row : row + 1, :n], alone)
        for name, value in alone.tensors().items():
            torch.testing.assert_close(cell.now[name][row], value[0])


def feed(body: Body, x: Tensor, cell: Recurrent, lengths: Tensor | None = None) -> Tensor:
    context = Context(torch.arange(x.shape[1])[None], Causal(), None, lengths)
    body.view, context.views = 0, [body.prepare(context, cell, x.shape[1])]
    return body(x, context, cell)


@every
def test_the_weights_that_a_tap_sees_make_the_output(spec):
    spec = edit(spec.memory(C) if isinstance(spec, System) else spec, "norm", None)
    body, tap = wild(edit(spec, "gate", None).build(C), 0.3), Tap("f.weights")
    x = tokens(2, T, C)
    out, weights = run(body, x, Causal(), tap=tap), tap["f.weights"]
    v = x @ body.v.weight.T if body.v_conv is None else F.silu(body.v_conv(x @ body.v.weight.T).out)
    assert weights.shape == (2, spec.heads, T, T)
    assert not weights.triu(1).any()
    read = (weights @ v.unflatten(-1, (spec.heads, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(read @ body.o.weight.T, out)


@every
def test_in_half_precision_the_state_stays_single(spec):
    body, x = wild(spec.build(C), 0.3).float(), tokens(2, T, C).float()
    whole = run(body, x, Causal())
    with torch.autocast("cpu", torch.bfloat16):
        automatic = run(body, x, Causal())
    automatic.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in body.parameters() if parameter.grad is not None)
    with torch.no_grad():
        half, cell = run(body.bfloat16(), x.bfloat16(), Causal()), body.new_cell(2, T, {})
        feed(body, x.bfloat16(), cell)
    assert (half.dtype, cell.now["S"].dtype) == (torch.bfloat16, torch.float32)
    for found in (half, automatic):
        assert (found - whole).square().mean() < 0.03**2 * whole.square().mean()


@torch.no_grad()
@every
def test_a_state_is_a_stated_number_of_bytes(spec):
    body = spec.build(C)
    cell = body.new_cell(3, 1000, {})
    feed(body, tokens(3, T, C).float(), cell)
    assert cell.needs([1000] * 3, []) == sum(value.nbytes for value in cell.tensors().values())
    memory = body.spec
    keys, values = memory.key_width or C // memory.heads, memory.value_width or memory.key_width or C // memory.heads
    assert cell.now["S"].nbytes == 3 * memory.heads * keys * (values + memory.rule.column) * 4


def test_a_rotated_memory_goes_on_at_its_own_position():
    body = wild(Retention(H).build(C), 0.3)
    x, cell = tokens(2, T, C), body.new_cell(2, T, {})
    later = Context(torch.arange(20, T)[None], Causal(), 20)
    first = feed(body, x[:, :20], cell)
    later.views = [body.prepare(later, cell, T - 20)]
    torch.testing.assert_close(torch.cat((first, body(x[:, 20:], later, cell)), 1), run(body, x, Causal()))


@each
def test_a_system_is_a_memory_and_a_table_that_a_command_line_can_give(system):
    row = system.memory(C)
    assert isinstance(row, Memory)
    assert load(dump(row)) == row
    assert load({"kind": system.kind, "heads": H}) == system
    assert repr(system.build(C).spec) == repr(row)
    stack = Stack(Block(attn=Branch(Attention(4)), other=Branch(Attention(4))), depth=2)
    swapped = edit(stack, "*.attn.f", lambda attention: dc.replace(system, heads=attention.heads))
    assert swapped.layers[1].branches["attn"].f == dc.replace(system, heads=4)
    assert edit(stack, "1.attn.f", {"kind": system.kind, "heads": 4}).layers[1] == swapped.layers[1]


def test_a_row_of_one_s_own_is_a_decay_and_works_everywhere():
    body = wild(Memory(H, decay=Halving(), rule=Delta(), feature=Unit()).build(C), 0.3)
    same = wild(GatedDeltaNet(H).build(C), 0.3)
    assert same.decay is not None
    x = tokens(2, 5, C)
    S, q, k, v = torch.zeros(2, H, 12, 12).double(), *(heads(x, w) for w in (body.q, body.k, body.v))
    q, k = (Unit().map(y) for y in (q, k))
    beta = (x @ body.rule.rate.up.weight.T).sigmoid().mT[..., None, None]
    out = []
    for t in range(5):
        key = k[:, :, t, :, None]
        S = S / 2
        S = S + beta[:, :, t] * key @ (v[:, :, t, None] - key.mT @ S)
        out.append((q[:, :, t, None] @ S)[:, :, 0])
    y = body.norm(torch.stack(out, 1) / 12**0.5).flatten(2)
    torch.testing.assert_close(run(body, x, Causal()), y @ body.o.weight.T)


class Halving(Decay):
    """A third party's decay: each memory halves at each token."""

    def build(self, width: int, heads: int, key_width: int) -> nn.Module:
        return Halved(heads)


class Halved(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        return torch.full((self.heads,), 0.5, dtype=x.dtype).log()


def test_fresh_gates_begin_as_published():
    torch.manual_seed(0)
    decay = PerHead().build(C, 8, 4)(tokens(1, 1, C))
    torch.testing.assert_close(decay.exp(), 1 - 2.0 ** (-5 - torch.arange(8.0, dtype=torch.float64)))
    assert PerHead(first=60.0).build(C, 4, 4)(tokens(1, 1, C).float()).max() < 0  # too near 1 for a single number
    forget = PerToken(start=(3.0, 6.0)).build(C, 4, 4)
    assert forget.gate.bias.tolist() == [3, 4, 5, 6]
    assert Exponential(start=-10.0).build(C, 4).gate.bias.tolist() == [-10] * 4
    assert PerChannel().build(C, 2, 3).gate.bias.tolist() == [0] * 6
    assert PerChannel(start=4.0).build(C, 2, 3).gate.bias.tolist() == [4] * 6
    step, slow = StepSize().build(C, 64, 4), StepSize(rates=(0.25, 0.5)).build(C, 64, 4)
    assert 1 <= step.A_log.exp().min() < 4 and 12 < step.A_log.exp().max() <= 16
    assert 0.249 <= slow.A_log.exp().min() < slow.A_log.exp().max() <= 0.501
    assert 0.9e-3 <= F.softplus(step.step.bias).min() <= F.softplus(step.step.bias).max() <= 0.11


def test_specs_stay_small():
    assert all(len(dc.fields(KINDS[kind])) <= 12 for kind in kinds(Spec) if "memory" in KINDS[kind].__module__)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Memory(0), "at least 1"),
        (lambda: Memory(4, conv=0), "at least 1"),
        (lambda: Memory(4, groups=3), "3 groups do not divide 4 heads"),
        (lambda: Memory(5).build(C), "5 heads do not divide the width 24"),
        (lambda: Memory(4, norm=BatchNorm()), "over the batch"),
        (lambda: Memory(4, gate="swish"), "unknown activation 'swish'"),
        (lambda: GLA(16).build(C), "32 parts do not divide the width 24"),
        (lambda: PerToken(temperature=0.0), "the temperature of per-token is a number above 0"),
        (lambda: PerChannel(rank=0), "the rank of per-channel"),
        (lambda: StepSize(rank=-1), "the rank of step-size"),
        (lambda: StepSize(rates=(0.0, 1.0)), r"rates are the least and the most .*, not \(0\.0, 1\.0\)"),
        (lambda: PerHead(first=0.0), "first lies above 0"),
        (lambda: Tied(1.0), "the floor of a decay"),
        (lambda: Delta(2.5), r"most lies in \(0, 2\]"),
        (lambda: Exponential(cap=-1.0), "the cap of exponential"),
        (lambda: run(Memory(4, position=ALiBi()).build(C), tokens(1, 2, C).float()), "no scores to add to: alibi"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(QkvError, match=message):
        make()
