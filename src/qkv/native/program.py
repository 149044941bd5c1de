"""Programs in the place of a model's torch passes."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.masks import Full
from qkv.models.model import Wiring
from qkv.native import lower
from qkv.native.builder import Add, Builder
from qkv.native.builder import Read as ReadFrom
from qkv.native.cache import Held, Paged, Pages, Read
from qkv.native.library import INPUT, OUTPUT, Call, Engine, Kind, Numbers, Records
from qkv.native.mixers import key_norms
from qkv.native.tiles import Arena
from qkv.ops.sample.scores import Kernels
from qkv.parts.head import VocabularyHead
from qkv.state import Cell, State

ROWS = 256
"""So many rows are computed together at most."""
SLOTS = np.arange(ROWS, dtype=np.int32)


class Program:
    """Records whose tables reach as many positions as have been asked for."""

    def __init__(self, engine: Engine, build: Builder) -> None:
        self.engine, self.build, self.reached = engine, build, -1
        self.records: Records | None = None
        self.lock = threading.Lock()

    def reach(self, positions: int) -> None:
        """Make the tables for so many positions."""
        if positions <= self.reached:
            return
        with self.lock:  # another thread may need more of them, and still runs the records of before
            if positions > self.reached:
                reached = max(positions, min(2 * self.reached, 1 << 20), 256)
                self.records = self.recorded(reached)
                self.reached = reached

    def recorded(self, reached: int) -> Records:
        made: dict[Any, Tensor] = {}

        def value(one: Any) -> Any:
            if not callable(one):
                return one
            if one not in made:
                made[one] = one(reached)
            return made[one]

        ops = [{name: value(one) for name, one in op.items()} | {"table_rows": reached} for op in self.build.ops]
        return Records(ops, self.build.widths, self.build.wide_cache)

    def run(self, output: Tensor, **given: Any) -> None:
        """One call; arrays are int32 and as long as there are rows."""
        assert self.records is not None
        fields = {name: one.ctypes.data if isinstance(one, np.ndarray) else one for name, one in given.items()}
        self.engine.run(self.records, Call(rows=len(output), output=output.data_ptr(), **fields))


class Pass(Program):
    """From ids to hidden vectors: embedding, stack and last norm of a wiring."""

    def __init__(self, engine: Engine, arena: Arena, wiring: Wiring, wide_cache: bool) -> None:
        build = Builder(arena, wiring.mask, wide_cache)
        x = lower.embed(build, wiring.embed)
        width = build.widths[x]
        lower.stack(build, wiring.stack, x)
        build.widths[OUTPUT] = width
        build.normalise(wiring.norm, x, Add(OUTPUT))
        super().__init__(engine, build)
        self.width, self.mask = width, wiring.mask
        self.vocabulary = len(wiring.embed.table)
        self.segments = 0 if wiring.embed.segments is None else wiring.embed.segments.num_embeddings
        self.pages = Pages(engine, build.page, *(build.runs if len(build.runs) == 1 else ()))
        self.memories = Memories(engine, arena, build, width, wide_cache) if build.memories else None

    def new_cells(self, batch: int, room: int, given: Mapping[str, Tensor]) -> list[dict[str, Cell]]:
        """One cell for the whole stack, and one for the memory that it reads."""
        self.reach(room)
        cells: dict[str, Cell] = {"text": Paged(self.pages, batch)}
        if self.build.state_bytes:
            cells["held"] = Held(batch, self.build.state_bytes)
        if self.memories is not None:
            if "memory" not in given:
                raise QkvError("the state needs the memory 'memory': new_state(…, **model.encode(source))")
            found = tuple(given["memory"].shape)
            if len(found) != 3 or (found[0], found[2]) != (batch, self.width):
                raise QkvError(f"the memory of {batch} rows has the shape ({batch}, tokens, {self.width}), not {found}")
            cells["memory"] = self.memories.read(given["memory"], given.get("memory_lengths"))
        return [cells]

    def __call__(self, ids: Tensor, lengths: Tensor | None, state: State | None, given: Mapping[str, Tensor]) -> Tensor:
        """ids B T → B T C, in fp32; rows packed left, of which the first lengths[b] are computed."""
        B, T = ids.shape
        if T == 1 and lengths is None and state is not None and B <= ROWS and "segments" not in given:
            return self.step(ids, state)
        begins = np.zeros(B, np.int64) if state is None else state.lengths.numpy()
        ends = begins + (T if lengths is None else lengths.numpy())
        at = np.arange(B * T) if lengths is None else np.flatnonzero(np.arange(T) < (ends - begins)[:, None])
        text, column = np.divmod(at, T) if T else (at, at)
        rows = {
            "tokens": known("ids", ids.numpy().reshape(-1)[at], self.vocabulary),
            "positions": (begins[text] + column).astype(np.int32),
        }
        if "segments" in given and self.segments:
            segments = given["segments"].expand(B, T).numpy()
            rows["segments"] = known("segments", segments.reshape(-1)[at], self.segments)
        self.reach(int(ends.max(initial=1)))
        x = torch.empty(len(at), self.width)
        for some in self.parts(ends - begins) if state is None else [slice(0, B)]:
            if state is None:
                mine = {name: given[name][some] for name in ("memory", "memory_lengths") if name in given}
            (cells,) = self.new_cells(some.stop - some.start, 1, mine) if state is None else state.cells
            more = prepared(cells, begins[some], ends[some])
            first, last = np.searchsorted(text, (some.start, some.stop)).tolist()
            slots = (text - some.start).astype(np.int32)
            for cut in self.cuts(first, last):
                self.run(x[cut], slots=slots[cut], **{name: row[cut] for name, row in rows.items()}, **more)
        if lengths is None:
            return x.view(B, T, self.width)
        out = torch.zeros(B, T, self.width)
        out.view(-1, self.width)[at] = x
        return out

    def step(self, ids: Tensor, state: State) -> Tensor:
        """One more token for each text: the same, without what only longer calls need."""
        begins, (cells,) = state.lengths.numpy(), state.cells
        self.reach(state.most + 1)
        more = prepared(cells, begins, begins + 1)
        x = torch.empty(len(begins), 1, self.width)
        tokens = known("ids", ids.numpy()[:, 0], self.vocabulary)
        self.run(x, tokens=tokens, positions=begins.astype(np.int32), slots=SLOTS, **more)
        return x

    def parts(self, counts: Numbers) -> Iterator[slice]:
        """Texts without a state that are computed together: as many as fill the kernels, so that few hold a cache."""
        at = 0
        while at < len(counts):
            end = at + 1
            while end < len(counts) and counts[at : end + 1].sum() <= ROWS:
                end += 1
            yield slice(at, end)
            at = end

    def cuts(self, first: int, last: int) -> Iterator[slice]:
        """Rows of one call. Where tokens see those to come, no text may be cut."""
        step = ROWS if self.mask.incremental else max(last - first, 1)
        return (slice(at, min(at + step, last)) for at in range(first, last, step))


def prepared(cells: Mapping[str, Cell], begins: Numbers, ends: Numbers) -> dict[str, Any]:
    """Room for each text's positions begins[b] to ends[b] → what the kernels read of the cells, as fields of a call."""
    own = cells["text"]
    assert isinstance(own, Paged)
    own.reserve(begins, ends)
    fields: dict[str, Any] = {"text": own.seen(ends.astype(np.int32))}
    for cell in cells.values():
        fields |= cell.fields() if isinstance(cell, Read | Held) else {}
    return fields


def known(name: str, numbers: Numbers, count: int) -> Numbers:
    """Numbers from 0 to `count`, as the kernels read them."""
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < count:
        raise QkvError(f"{name} lie between 0 and {count - 1}; found {numbers.min()} and {numbers.max()}")
    return numbers.astype(np.int32)


class Memories(Program):
    """The keys and values of a memory, for every layer that reads it."""

    def __init__(self, engine: Engine, arena: Arena, reader: Builder, width: int, wide_cache: bool) -> None:
        build = Builder(arena, Full(), wide_cache)
        build.widths[INPUT] = width
        for body, keys, values in reader.memories:
            groups, head_width = body.groups, body.head_width
            both = build.buffer("keys and values", 2 * groups * head_width)
            build.linear([body.k, body.v], ReadFrom(INPUT), Add(both))
            build.add(Kind.KEYS, **{"in": both}, groups=groups, head_width=head_width, keys_at=keys, values_at=values,
                      **key_norms(build, body))  # fmt: skip
        super().__init__(engine, build)
        self.pages = Pages(engine, reader.memory_page)

    def read(self, memory: Tensor, lengths: Tensor | None) -> Read:
        """memory M S C → its cell."""
        self.reach(1)
        M, S = memory.shape[:2]
        counts = np.full(M, S) if lengths is None else lengths.numpy()
        paged = Paged(self.pages, M)
        paged.reserve(np.zeros(M, np.int64), counts)
        lasts = counts.astype(np.int32)
        row, column = np.nonzero(np.arange(S) < counts[:, None])
        x = memory.float()[row, column].contiguous()
        self.run(
            torch.empty(len(x), 0), input=x.data_ptr(), positions=column.astype(np.int32), slots=row.astype(np.int32),
            text=paged.seen(lasts),
        )  # fmt: skip
        return Read(paged, lasts)


class Logits(Program):
    """From hidden vectors to scores over the vocabulary."""

    def __init__(self, engine: Engine, arena: Arena, head: VocabularyHead, table: Tensor, width: int) -> None:
        build = Builder(arena, Full(), wide_cache=False)
        build.widths[INPUT] = width
        lower.head(build, head, table)
        super().__init__(engine, build)
        self.reach(1)
        self.kernels: Kernels = engine

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.build.widths[INPUT]:
            raise QkvError(f"hidden vectors are {self.build.widths[INPUT]} wide, not {x.shape[-1]}")
        rows = x.detach().float().reshape(-1, x.shape[-1]).contiguous()
        out = torch.empty(len(rows), self.build.widths[OUTPUT])
        if len(rows):
            self.run(out, input=rows.data_ptr())
        return out.view(*x.shape[:-1], out.shape[1])
