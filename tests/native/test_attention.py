"""Cached attention against the naive equation in fp64, for texts of all lengths in one call."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkv.context import Context
from qkv.masks import Causal, Full, Mask, Window
from qkv.native import mixers
from qkv.native.builder import Add, Builder, Read
from qkv.native.cache import Paged, Pages
from qkv.native.library import INPUT, OUTPUT
from qkv.native.program import Program
from qkv.native.tiles import Arena
from qkv.ops import attention
from qkv.parts import Additive, ALiBi, Attention, LayerNorm, Relative, RMSNorm, Rotary, ScaledDot
from qkv.parts.position import BandScaling, LinearScaling, YaRN
from tests.native.helpers import engine

WIDTH = 24
LENGTHS = [1, 63, 64, 65, 200]
BANDS = BandScaling(8.0, low=1.0, high=4.0, trained=64)
CASES: dict[str, tuple[Attention, Mask]] = {
    "one head": (Attention(1, head_width=16), Causal()),
    "grouped queries": (Attention(6, kv_heads=2, head_width=16), Causal()),
    "one key-value head": (Attention(11, kv_heads=1, head_width=20), Causal()),
    "wide heads": (Attention(3, head_width=48, bias=True), Causal()),
    "very wide heads": (Attention(2, kv_heads=1, head_width=136), Causal()),
    "odd heads": (Attention(2, head_width=5, bias="qv"), Causal()),
    "window": (Attention(4, head_width=20, mask=Window(17)), Causal()),
    "itself alone": (Attention(2, head_width=16, mask=Window(1)), Causal()),
    "long window": (Attention(4, kv_heads=2, head_width=16), Causal() & Window(65)),
    "both sides": (Attention(4, kv_heads=2, head_width=20), Full()),
    "window on both sides": (Attention(4, head_width=16), Window(9)),
    "softcap": (Attention(4, head_width=20, score=ScaledDot(softcap=3.0)), Causal()),
    "scale": (Attention(4, head_width=16, score=ScaledDot(scale=0.3)), Causal()),
    "ALiBi": (Attention(6, kv_heads=3, head_width=16, position=ALiBi()), Causal()),
    "ALiBi on both sides": (Attention(5, head_width=20, position=ALiBi()), Full()),
    "relative": (Attention(4, head_width=20, score=ScaledDot(scale=1.0), position=Relative(both=False)), Causal()),
    "relative on both sides": (Attention(4, head_width=16, position=Relative(buckets=8, far=16)), Full()),
    "rotary": (Attention(4, kv_heads=2, head_width=48, position=Rotary()), Causal()),
    "part of a head": (Attention(3, head_width=20, position=Rotary(theta=100.0, fraction=0.5)), Causal()),
    "linear": (Attention(2, head_width=20, position=Rotary(scaling=LinearScaling(4.0))), Causal()),
    "bands": (Attention(2, head_width=36, position=Rotary(scaling=BANDS)), Full()),
    "YaRN": (Attention(2, head_width=16, position=Rotary(scaling=YaRN(4.0, trained=64))), Causal()),
    "norms": (Attention(4, kv_heads=2, head_width=20, norm=LayerNorm(), position=Rotary()), Causal()),
    "norms without shifts": (Attention(2, head_width=16, norm=RMSNorm(offset=1.0), position=Rotary()), Causal()),
}  # fmt: skip


def made(spec: Attention) -> Any:
    torch.manual_seed(0)
    body = spec.build(WIDTH)
    for parameter in body.parameters():
        nn.init.normal_(parameter, std=0.3)
    return body


def texts() -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(n, WIDTH, generator=source) for n in LENGTHS]


class Native:
    """An attention by itself, as a program that reads vectors and feeds as many texts as there are lengths."""

    def __init__(self, body: Any, mask: Mask, wide: bool = True, threads: int = 1) -> None:
        build = Builder(Arena(), mask, wide)
        build.widths[INPUT] = build.widths[OUTPUT] = WIDTH
        mixers.lower(build, body, Read(INPUT), Add(OUTPUT))
        self.program = Program(engine(threads), build)
        self.program.reach(max(LENGTHS))
        self.cell = Paged(Pages(self.program.engine, build.page), len(LENGTHS))
        self.lengths = np.zeros(len(LENGTHS), np.int64)

    def feed(self, some: list[Tensor]) -> list[Tensor]:
        """What each text's next vectors become; all of them in one call."""
        counts = np.array([len(x) for x in some])
        begins, self.lengths = self.lengths, self.lengths + counts
        self.cell.reserve(begins, self.lengths)
        x, out = torch.cat(some), torch.full((int(counts.sum()), WIDTH), torch.nan)
        positions = np.concatenate([at + np.arange(n) for at, n in zip(begins, counts, strict=True)])
        self.program.run(
            out, input=x.data_ptr(), positions=positions.astype(np.int32),
            slots=np.repeat(np.arange(len(some)), counts).astype(np.int32),
            text=self.cell.seen(lasts := self.lengths.astype(np.int32)),
        )  # fmt: skip
        assert len(lasts) == len(some)
        return list(out.split(counts.tolist()))


def naive(body: Any, mask: Mask, x: Tensor) -> Tensor:
    """The same, T C, by the equation; positions turn by the angles that fp32 gives."""
    at = torch.arange(len(x))[None]
    context, queries, keys = Context(at), at[:, :, None], at[:, None]
    q, k, v = (body.split(layer(x[None])) for layer in (body.q, body.k, body.v))
    if body.q_norm is not None:
        q, k = body.q_norm(q), body.k_norm(k)
    bias = None
    if body.position is not None:
        table = body.position.table(at, context)
        q, k = body.position.rotate(q, table), body.position.rotate(k, table)
        bias = body.position.bias(queries, keys, context)
    seen, dot = (mask & body.spec.mask).allow(queries, keys, context), body.score.dot
    found = attention.naive(
        *(q, k, v), mask=None if seen is None else seen[:, None], bias=bias, scale=dot.scale, softcap=dot.softcap
    )
    return body.o(found.out.transpose(1, 2).flatten(2))[0]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wide", [True, False], ids=["floats", "halves"])
def test_it_is_the_naive_equation(name: str, wide: bool) -> None:
    spec, mask = CASES[name]
    body = made(spec)
    found = Native(body, mask, wide).feed(texts())
    double = body.double()
    for x, y in zip(texts(), found, strict=True):
        expected = naive(double, mask, x.double())
        assert (y - expected).abs().max() <= (1e-5 if wide else 2e-3) * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, (_, mask) in CASES.items() if mask.incremental])
def test_pieces_threads_and_neighbours_change_no_bit(name: str) -> None:
    spec, mask = CASES[name]
    body, whole = made(spec), Native(made(spec), mask).feed(texts())
    pieces = Native(body, mask, threads=2)
    fed: list[list[Tensor]] = [[] for _ in LENGTHS]
    for at, end in ((0, 1), (1, 30), (30, 31), (31, 64), (64, 66), (66, 75), (75, 200)):
        for got, y in zip(fed, pieces.feed([x[at:end] for x in texts()]), strict=True):
            got.append(y)
    for parts, expected in zip(fed, whole, strict=True):
        assert torch.equal(torch.cat(parts), expected)


def test_a_score_that_has_no_kernel_is_named() -> None:
    with pytest.raises(mixers.Unlowered, match="the score Additive"):
        Native(made(Attention(2, score=Additive())), Causal())
