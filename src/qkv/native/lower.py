"""The wiring of a model as records: embedding, stack, blocks and head."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qkv.native.builder import Add, Builder, Fields, Read, Unlowered
from qkv.native.library import OUTPUT, Kind
from qkv.native.mixers import act, lower
from qkv.native.tiles import store_of
from qkv.parts.block import BlockModule, ParallelModule
from qkv.parts.embed import TokenEmbedding
from qkv.parts.head import VocabularyHead
from qkv.parts.position import Learned, Sinusoidal
from qkv.parts.stack import StackModule


def embed(build: Builder, embedding: TokenEmbedding) -> int:
    """Tokens to the stream; gives its buffer."""
    spec, table = embedding.spec, embedding.table
    inner = table.shape[1]
    x = build.buffer("stream", inner if embedding.project is None else len(embedding.project.weight))
    first = x if embedding.project is None else build.buffer("embedded", inner)
    fields: Fields = {"store": store_of(table), "weight": build.arena.tiles([table]), "out": first, "outputs": inner}
    if spec.scaled:
        fields["scale"] = embedding.scale
    if embedding.position is not None:
        fields["position"] = position_table(embedding.position, inner)
    if embedding.segments is not None:
        fields["segment"] = build.floats(embedding.segments.weight)
    build.add(Kind.EMBED, **fields)
    if embedding.norm is not None:
        build.normalise(embedding.norm, first, Add(first))
    if embedding.project is not None:
        build.linear([embedding.project], Read(first), Add(x))
    return x


def position_table(position: nn.Module, width: int) -> Callable[[int], Tensor]:
    if not isinstance(getattr(position, "spec", None), Learned | Sinusoidal):
        raise Unlowered(f"the position {getattr(position, 'spec', type(position).__name__)}")

    def table(rows: int) -> Tensor:
        with torch.no_grad():
            return position(torch.zeros(1, rows, width), torch.arange(rows)[None])[0].float().contiguous()

    return table


def stack(build: Builder, module: StackModule, x: int) -> None:
    for n in range(len(module.use)):
        block(build, module.layer(n), x)


def block(build: Builder, module: BlockModule, x: int) -> None:
    width, source = build.widths[x], x
    if isinstance(module, ParallelModule):  # its branches read the stream as it was before any of them
        source = build.buffer("common", width)
        build.normalise(module.pre, x, Add(source))
    for _, branch in module.branches():
        plain = branch.out is None and branch.gate is None
        delta = x if plain else build.buffer("delta", width)
        lower(build, branch.f, Read(source, branch.pre), Add(x, x) if plain else Add(delta))
        if branch.out is not None:
            build.normalise(branch.out, delta, Add(delta) if branch.gate is not None else Add(x, x))
        if branch.gate is not None:
            build.normalise(branch.gate, delta, Add(x, x))
        if branch.post is not None:
            build.normalise(branch.post, x, Add(x))


def head(build: Builder, module: VocabularyHead, table: Tensor) -> None:
    """Hidden vectors to logits."""
    spec, read = module.spec, Read(0)
    if module.transform is not None:
        inner = build.buffer("transformed", module.transform.width)
        build.linear([module.transform.dense], read, Add(inner), act=act(module.transform.spec.act))
        read = Read(inner, module.transform.norm)
    weight = table if module.weight is None else module.weight
    more: Fields = {} if spec.scale is None else {"scale": spec.scale}
    if spec.softcap is not None:
        more |= {"softcap": spec.softcap}
    build.widths[OUTPUT] = len(weight)
    act_of = "identity" if spec.softcap is None else "softcap"
    build.product([weight], read, Add(OUTPUT), len(weight), module.bias, act_of, **more)
