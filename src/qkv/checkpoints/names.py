"""Names are a table: which tensors of a file fill which parameters of a model, read forwards and backwards.

    SOURCE                          TARGET                          [OPERATIONS]
    layers.{i}.self_attn.{q,k}_proj stack.{i}.attn.f.{q,k}

A row names a module, with its `.weight` and `.bias`, or one tensor. `{i}` is an index on both sides. Lists on both
sides are paired in order; a list on the right only means that the source holds the targets one below the other, an
index on the left only that the target stacks the sources. Operations turn the source into the target and have an
inverse, so that the same table writes a file. Every tensor of a file is read by exactly one row, or is

    = SOURCE TARGET     an alias: may be absent, and must be equal to what fills the target
    ~ PATTERN           derived: can be computed again, not needed
    + PATTERN           kept: weights for which the model has no part, carried along and written back
"""

import dataclasses as dc
import itertools
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from qkv.errors import QkvError

GROUP = re.compile(r"\{([\w.]*(?:,[\w.]*)+)\}")
INDEX = re.compile(r"\{(\w+)\}")
LEAF = r"(?P<leaf>\.weight|\.bias|)"
HIGHEST = 2**16
"""More tensors than any model stacks in one."""


@dc.dataclass(frozen=True)
class Link:
    """One step of a transfer: `sources`, stacked if they are several, fill `targets`, one below the other."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[str, ...]
    stacked: bool
    alias: bool


@dc.dataclass(frozen=True)
class Row:
    """A line of a table, its lists written out."""

    source: str
    targets: tuple[str, ...]
    operations: tuple[str, ...]
    alias: bool

    def links(self, shapes: Mapping[str, Sequence[int]]) -> Iterator[Link]:
        """The links that this row makes in a model with these parameters."""
        first = re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(self.targets[0])) + LEAF)
        for name, shape in shapes.items():
            found = first.fullmatch(name)
            if found is None:
                continue
            leaf, index = found["leaf"], {key: value for key, value in found.groupdict().items() if key != "leaf"}
            source = filled(self.source, index) + leaf
            stacked = INDEX.search(source) is not None
            if stacked and shape[0] > HIGHEST:
                raise QkvError(f"{name} would stack {shape[0]:,} tensors, and no model has so many")
            sources = [INDEX.sub(str(n), source) for n in range(shape[0])] if stacked else [source]
            targets = [filled(target, index) + leaf for target in self.targets]
            if all(target in shapes for target in targets):
                yield Link(tuple(sources), tuple(targets), self.operations, stacked, self.alias)


def filled(template: str, index: Mapping[str, str]) -> str:
    return INDEX.sub(lambda hole: index.get(hole[1], hole[0]), template)


@dc.dataclass(frozen=True)
class Table:
    """The rows of a table, and the patterns of what no row reads."""

    rows: tuple[Row, ...]
    derived: tuple[re.Pattern[str], ...]
    kept: tuple[re.Pattern[str], ...]

    def links(self, shapes: Mapping[str, Sequence[int]]) -> list[Link]:
        return [link for row in self.rows for link in row.links(shapes)]


@cache
def parse(text: str) -> Table:
    """Read a table."""
    rows: list[Row] = []
    patterns: dict[str, list[re.Pattern[str]]] = {"~": [], "+": []}
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words:
            continue
        if words[0] in patterns:
            patterns[words[0]].append(re.compile(re.escape(words[1]).replace(r"\*", ".*")))
            continue
        alias = words[0] == "="
        source, target, *operations = words[alias:]
        rows += [Row(one, many, tuple(operations), alias) for one, many in written_out(source, target)]
    return Table(tuple(rows), tuple(patterns["~"]), tuple(patterns["+"]))


def itself(names: Iterable[str]) -> Table:
    """The table of a file that has a model's own names."""
    return Table(tuple(Row(name, (name,), (), False) for name in names), (), ())


def written_out(source: str, target: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each source template with its targets: lists on both sides paired, one more on the right a split."""
    left, right = GROUP.findall(source), GROUP.findall(target)
    paired = [list(zip(a.split(","), b.split(","), strict=True)) for a, b in zip(left, right, strict=False)]
    for choice in itertools.product(*paired):
        one, many = source, target
        for a, b in choice:
            one, many = GROUP.sub(a, one, count=1), GROUP.sub(b, many, count=1)
        rest = right[len(left) :]
        yield one, tuple(GROUP.sub(part, many, count=1) for part in rest[0].split(",")) if rest else (many,)


# --- operations on a tensor, each with its inverse ---


def regrouped(x: Tensor, groups: int, queries: int, back: bool) -> Tensor:
    """Rows of G groups of r query heads, a key and a value head → all queries, all keys, all values."""
    if back:
        size = len(x) // (groups * (queries + 2))
        q, k, v = x.split([groups * queries * size, groups * size, groups * size])
        heads = [q.unflatten(0, (groups, queries, size)), *(y.unflatten(0, (groups, 1, size)) for y in (k, v))]
        return torch.cat(heads, 1).flatten(0, 2)
    heads = x.unflatten(0, (groups, queries + 2, -1))
    parts = heads[:, :queries], heads[:, queries : queries + 1], heads[:, queries + 1 :]
    return torch.cat([part.flatten(0, 2) for part in parts])


def halved(x: Tensor, heads: int, back: bool) -> Tensor:
    """Rows of each head from pairs side by side (x₀ x₁ x₀ x₁ …) to halves (x₀ x₀ … x₁ x₁ …), for rotary positions."""
    inner = (2, -1) if back else (-1, 2)
    return x.unflatten(0, (heads, *inner)).transpose(1, 2).flatten(0, 2)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "transpose": lambda x, back: x.t() if x.dim() == 2 else x,
    "squeeze": lambda x, dim, back: x.unsqueeze(dim) if back else x.squeeze(dim),
    "ungroup": regrouped,
    "rope": halved,
    "minus": lambda x, n, back: x + n if back else x - n,
    "log-minus": lambda x, back: -torch.exp(x) if back else torch.log(-x),
}


def apply(operations: Sequence[str], x: Tensor, back: bool = False) -> Tensor:
    """Apply `name:number:…` one after the other, or their inverses the other way round."""
    for operation in reversed(operations) if back else operations:
        name, *numbers = operation.split(":")
        x = OPERATIONS[name](x, *map(int, numbers), back=back)
    return x


# --- both ways ---


@dc.dataclass
class Plan:
    """How the tensors of a file fill a model, by names alone."""

    links: list[Link] = dc.field(default_factory=list)
    aliases: list[Link] = dc.field(default_factory=list)
    derived: list[str] = dc.field(default_factory=list)
    kept: list[str] = dc.field(default_factory=list)


def plan(table: Table, shapes: Mapping[str, Sequence[int]], keys: Collection[str]) -> Plan:
    """Match a file's names with a model's parameters; `QkvError` lists what does not come out even."""
    made, read, full = Plan(), set[str](), set[str]()
    lacking: dict[str, str] = {}
    links, there = table.links(shapes), set(keys)
    for link in links:
        if link.alias or not full.isdisjoint(link.targets):
            continue
        missing = [source for source in link.sources if source not in there]
        if missing:
            lacking.update(dict.fromkeys(link.targets, missing[0]))
            continue
        made.links.append(link)
        read.update(link.sources)
        full.update(link.targets)
    made.aliases = [link for link in links if link.alias and link.sources[0] in there and link.sources[0] not in read]
    read.update(link.sources[0] for link in made.aliases)
    left = [key for key in keys if key not in read]
    made.derived = [key for key in left if any(pattern.fullmatch(key) for pattern in table.derived)]
    read.update(made.derived)
    made.kept = [key for key in left if key not in read and any(pattern.fullmatch(key) for pattern in table.kept)]
    read.update(made.kept)
    unread = [key for key in left if key not in read]
    empty = [name for name in shapes if name not in full]
    if unread or empty:
        parts = [
            ("nothing reads " + shown(unread)) if unread else "",
            ("it lacks " + shown([lacking.get(name, f"… → {name}") for name in empty])) if empty else "",
        ]
        raise QkvError("; ".join(filter(None, parts)))
    return made


def shown(names: Sequence[str]) -> str:
    """The first of many names, as one short line whatever they are."""
    few = (name if name.isprintable() and len(name) <= 120 else reprlib.repr(name) for name in names[:4])
    return ", ".join(few) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def read(made: Plan, shapes: Mapping[str, Sequence[int]], get: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Parameter → tensor. What is used as it is stays what `get` gave, so that a mapped file is not copied."""
    tensors: dict[str, Tensor] = {}
    for link in made.links:
        tensors.update(transferred(link, shapes, get))
    for link in made.aliases:
        said, used = apply(link.operations, get(link.sources[0])), tensors[link.targets[0]]
        if said.shape != used.shape or not torch.equal(said, used):
            raise QkvError(f"{link.sources[0]} differs from {link.targets[0]}, with which the configuration ties it")
    return tensors


def transferred(link: Link, shapes: Mapping[str, Sequence[int]], get: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The tensors that a link makes, of the right shapes."""
    given = [get(source) for source in link.sources]
    try:
        parts = [apply(link.operations, one) for one in given]
        x = torch.stack(parts) if link.stacked else parts[0]
        pieces = x.split([shapes[target][0] for target in link.targets]) if len(link.targets) > 1 else [x]
    except (RuntimeError, IndexError, ValueError):
        raise QkvError(f"{link.sources[0]} cannot become {link.targets[0]}: its shape is another") from None
    for target, piece in zip(link.targets, pieces, strict=True):
        if tuple(piece.shape) != tuple(shapes[target]):
            found, wanted = reprlib.repr(tuple(piece.shape)), tuple(shapes[target])
            raise QkvError(f"by the configuration {target} has the shape {wanted}, {link.sources[0]} makes it {found}")
    return dict(zip(link.targets, pieces, strict=True))


def write(table: Table, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, by its names, from a model's; made one at a time."""
    written: set[str] = set()
    for link in table.links({name: tuple(tensor.shape) for name, tensor in tensors.items()}):
        if link.alias or not written.isdisjoint(link.targets):
            continue
        written.update(link.targets)
        parts = [tensors[target].detach() for target in link.targets]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        for source, one in zip(link.sources, x if link.stacked else [x], strict=True):
            yield source, apply(link.operations, one, back=True)
    lost = [name for name in tensors if name not in written]
    if lost:
        raise QkvError(f"this form has no place for {shown(lost)}")
