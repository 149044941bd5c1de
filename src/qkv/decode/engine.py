"""Many texts at a time through one model: requests join and leave between its steps."""

import threading
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from qkv.decode.request import Job, Request
from qkv.decode.search import Search, several
from qkv.decode.stream import shared
from qkv.errors import QkvError
from qkv.models import EncoderDecoderModel, Memory, Module
from qkv.ops.sample import Scores
from qkv.state import State


class Batcher:
    """Continues many texts together, each exactly as it would be continued alone.

    A step feeds a token to every text that is written, then up to `chunk` tokens of the prompts that wait, first come
    first served. At most `rows` rows are at work (a beam has several), and in `memory` bytes, if they are given, stands
    all that is held between two calls of the model. What room remains keeps the states of recent texts, from which a
    text with the same beginning goes on. Requests may be added and cancelled by any thread.

    >>> engine = Batcher(model, memory=2 << 30)
    >>> story = engine.add(ids, Sample(top_p=0.9), limit=200, ends={end}, seed=7)
    >>> other = engine.add(others, Beam(size=4), limit=50, ends={end})
    >>> for token in story: print(token)                # which steps the engine, and so the other one too
    >>> other.result()[0].ids
    """

    @torch.inference_mode()
    def __init__(self, model: Module, rows: int = 16, chunk: int = 256, memory: int | None = None) -> None:
        if rows < 1 or chunk < 1:
            raise QkvError(f"an engine has at least 1 row and reads at least 1 token, not {rows} and {chunk}")
        self.model, self.rows, self.chunk, self.memory = model.eval(), rows, chunk, memory
        one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        given = model.encode(one) if isinstance(model, EncoderDecoderModel) else None
        self.width = 0 if given is None else given["memory"].shape[-1]
        self.empty = model.new_state(1, 1) if given is None else model.new_state(1, 1, **given)
        self.beginning = self.empty.mark()
        self.own = held([self.empty])
        self.waiting: deque[Job] = deque()
        self.reading: list[Job] = []
        self.running: list[Job] = []
        self.state: State | None = None
        """The rows of those that run, one after the other."""
        self.kept: dict[tuple[int, ...], State] = {}
        """What has been read, with its state; the latest last."""
        self.news = threading.Condition()
        """Guards what waits and what requests hold; it tells of new requests, tokens, and ends."""
        self.busy = self.closed = False

    # --- for any thread ---

    def add(
        self, ids: Sequence[int], search: Search, *, limit: int, ends: int | Collection[int] | None = None,
        seed: int = 0, memory: Memory | None = None,
    ) -> Request:  # fmt: skip
        """A text to be continued by up to `limit` tokens, arguments as for `decode` of one row.

        Raises QkvError where it could never be served.
        """
        embed, pairs = self.model.wiring.embed, isinstance(self.model, EncoderDecoderModel)
        if not ids or limit < 1:
            raise QkvError(f"a prompt needs at least one token and a limit of 1; found {len(ids)} and {limit}")
        if not 0 <= min(ids) <= max(ids) < len(embed.table):
            raise QkvError(f"ids lie between 0 and {len(embed.table) - 1}; found {min(ids)} and {max(ids)}")
        if pairs != (memory is not None):
            raise QkvError("an encoder-decoder needs memory=model.encode(source)" if pairs else "this model reads none")
        given = {} if memory is None else alone(memory, self.width)
        job = Job(Request(self), list(ids), search, limit, several(ends), seed, given)
        asked = f"{len(ids)} tokens and {limit} new ones"
        if embed.room is not None and job.need > embed.room:
            raise QkvError(f"{asked} are too many for a model of {embed.room} positions: shorten the prompt or limit")
        if search.paths > self.rows:
            raise QkvError(f"a search of {search.paths} paths needs as many rows, and the engine has {self.rows}")
        if not self.fits([job]):
            raise QkvError(f"{asked} take {self.needs([job])} bytes, and the engine has {self.memory}: give it more")
        with self.news:
            if self.closed:
                raise QkvError("the engine is closed")
            self.waiting.append(job)
            self.news.notify_all()
        return job.request

    def wait(self, request: Request, tokens: int) -> bool:
        """Wait until a request has more than so many tokens, or has ended → whether it goes on."""

        def ready() -> bool:
            return request.done or len(request.tokens) > tokens

        while not ready():
            with self.news:
                self.news.wait_for(lambda: ready() or not self.busy)
            if not ready():
                self.go_on()
        return not request.done

    def run(self) -> None:
        """Step whenever there is something to do, until the engine is closed: for a thread of its own."""
        while not self.closed:
            with self.news:
                self.news.wait_for(lambda: self.closed or self.pending)
            if not self.closed:
                self.go_on()

    def go_on(self) -> None:
        """A step; what goes wrong in it, each request that took part is told."""
        with suppress(Exception):
            self.step()

    def close(self) -> None:
        """Give up all requests after the step that is being made, and take no more."""
        with self.news:
            self.closed = True
            self.news.wait_for(lambda: not self.busy)
            for job in (*self.waiting, *self.reading, *self.running):
                job.request.cancel()
            self.waiting.clear()
            self.reading, self.running, self.state, self.kept = [], [], None, {}
            self.news.notify_all()

    @property
    def pending(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.reading or self.running)

    @torch.inference_mode()
    def step(self) -> bool:
        """One token for each text that is written, and some for prompts → whether anything is left to do."""
        with self.news:
            self.news.wait_for(lambda: not self.busy)
            self.busy = True
        try:
            self.write()
            self.read()
        except BaseException as error:  # what the cells hold now, nobody knows
            told = [*self.reading, *self.running]
            if not told and self.waiting and isinstance(error, Exception):
                told.append(self.waiting.popleft())  # so that what always fails is not tried for ever
            for job in told:
                job.request.finish(error=failed(error))
            self.reading, self.running, self.state = [], [], None
            raise
        finally:
            with self.news:
                self.busy = False
                self.news.notify_all()
        return self.pending

    # --- for the thread that steps ---

    def write(self) -> None:
        """One more token for each text whose prompt has been read."""
        self.settle()
        if self.state is None:
            return
        tokens = torch.cat([job.tokens for job in self.running]).to(self.model.device)
        scores = self.model.choices(self.model.hidden(tokens[:, None], state=self.state)[:, 0])
        scores.sums(1.0)  # of all rows together: every search asks for log p
        at, ended = 0, False
        for job, own in zip(self.running, scores.split([job.rows for job in self.running]), strict=True):
            job.read += 1
            job.choose(own)
            if job.request.hypotheses and job.follows:
                ended = True
                self.keep(job, self.state.fork(torch.tensor([at]), job.read))
            at += job.rows
        self.settle()
        if ended:
            self.trim()
        with self.news:
            self.news.notify_all()

    def settle(self) -> None:
        """Of all rows keep those that go on, in the order in which they are fed next."""
        at, rows, going = 0, list[int](), list[Job]()
        for job in self.running:
            first, at = at, at + job.rows
            if not job.request.done:
                rows += [first + parent for parent in (range(job.rows) if job.parents is None else job.parents)]
                job.rows, job.parents = len(job.tokens), None
                going.append(job)
        self.running = going
        if not going:
            self.state = None
        elif self.state is not None and rows != list(range(at)):
            self.state = self.state.fork(torch.tensor(rows), max(job.need for job in going))

    def read(self) -> None:
        """Feed prompts, in the order in which they came, as many tokens as there may be in a step."""
        self.reading = [job for job in self.reading if not job.request.done]
        group, counts, longest, room = list[Job](), list[int](), 0, 0
        for job in self.prompts():
            count = min(len(job.ids) - job.read, self.chunk - sum(counts))
            longest, room = max(longest, job.read), max(room, job.need)
            if longest + max((*counts, count)) > room:  # what pads the shorter rows must have room as well
                break
            group.append(job)
            counts.append(count)
            if sum(counts) == self.chunk:
                break
        if not group:
            return
        state, T = together(group), max(counts)
        ids = [[*job.ids[job.read :][:n], *[0] * (T - n)] for job, n in zip(group, counts, strict=True)]
        fed, lengths = torch.tensor(ids, device=self.model.device), torch.tensor(counts, device=self.model.device)
        x = self.model.hidden(fed, state=state, lengths=None if min(counts) == T else lengths)
        for n, (job, count) in enumerate(zip(group, counts, strict=True)):
            job.read += count
            job.state = state.fork(torch.tensor([n]), job.need) if len(group) > 1 else state
        ready = [n for n, job in enumerate(group) if job.read == len(job.ids)]
        if ready:
            found = self.model.choices(x[ready, lengths[ready] - 1])
            for n, scores in zip(ready, found.split([1] * len(ready)), strict=True):
                self.begin(group[n], scores)
            self.trim()

    def prompts(self) -> Iterator[Job]:
        """Those that are read, then those that wait as they are let in."""
        yield from list(self.reading)
        while (job := self.admit()) is not None:
            yield job

    def admit(self) -> Job | None:
        """Let in the request that has waited longest, with the state of a text that begins like it."""
        while self.waiting and self.waiting[0].request.done:
            self.waiting.popleft()
        if not self.waiting:
            return None
        job = self.waiting[0]
        active = [*self.reading, *self.running, job]
        if sum(one.search.paths for one in active) > self.rows or not self.fits(active):
            return None
        found = max(() if job.given else self.kept, key=lambda text: self.saved(text, job.ids), default=())
        saved = self.saved(found, job.ids)
        soon = max((self.saved(one.ids, job.ids) for one in self.reading), default=0)
        if not job.given and 2 * (soon - saved) >= len(job.ids) - saved:
            return None  # much of it is being read at this moment
        self.reading.append(self.waiting.popleft())
        self.trim(spare=found if saved else ())
        if saved:
            job.state, job.read = self.kept[found].fork(room=job.need), saved
            if len(found) > saved:
                job.state.rewind(self.beginning, shared(found, job.ids))
            self.kept[found] = self.kept.pop(found)  # the latest
            self.trim()
        else:
            try:
                job.state = self.model.new_state(1, job.need, **job.given)
            except Exception as error:  # nothing of the others has been touched
                self.reading.remove(job)
                job.request.finish(error=failed(error))
                return self.admit()
        return job

    def saved(self, old: Sequence[int], new: Sequence[int]) -> int:
        """How many tokens of a new text need not be fed to a state that has read the old one."""
        same = shared(old, new)
        return same if same == len(old) else same - self.empty.rewind(self.beginning, same)

    def begin(self, job: Job, scores: Scores) -> None:
        """A prompt has been read: from now on its rows stand with the others."""
        state, job.state = job.state, None
        assert state is not None
        self.keep(job, state.fork(room=job.read))
        self.reading.remove(job)
        job.choose(scores)
        if job.request.done:
            return
        room = max(one.need for one in (*self.running, job))
        state = state.fork(None if job.parents is None else torch.tensor(job.parents), room)
        job.rows, job.parents = len(job.tokens), None
        self.running.append(job)
        if self.state is None:
            self.state = state
        else:
            self.state = (self.state if self.state.room == room else self.state.fork(room=room)).join(state)

    # --- memory ---

    def keep(self, job: Job, state: State) -> None:
        """The state of a text so far (one row), for others that begin like it."""
        text = tuple([*job.ids, *job.request.tokens][: job.read])
        if not job.given:
            for old in [old for old in self.kept if old == text[: len(old)] and self.saved(text, old) >= len(old) - 1]:
                del self.kept[old]  # the longer one serves as well
            self.kept[text] = state

    def trim(self, spare: tuple[int, ...] = ()) -> None:
        """Let go of the states that were kept longest, but for one, until there is room for all that is at work."""
        jobs = [*self.reading, *self.running]
        for old in [old for old in self.kept if old != spare]:
            if len(self.kept) <= self.rows and self.fits(jobs, self.kept.values()):
                break
            del self.kept[old]

    def needs(self, jobs: Iterable[Job], states: Iterable[State] = ()) -> int:
        """The bytes that these take at most, and those of states that are kept."""
        rows = [job for job in jobs for _ in range(job.search.paths)]
        memories = [job.given["memory"].shape[1] for job in rows if job.given]
        return self.own + self.empty.needs([job.need for job in rows], memories) + held(states)

    def fits(self, jobs: Iterable[Job], states: Iterable[State] = ()) -> bool:
        return self.memory is None or self.needs(jobs, states) <= self.memory

    def bytes(self) -> int:
        """The size of all that is held now; what several texts share counts once."""
        reading = [job.state for job in self.reading if job.state is not None]
        return held([self.empty, *reading, *self.kept.values(), *([] if self.state is None else [self.state])])


def held(states: Iterable[State]) -> int:
    """The bytes of all that states hold; what they share counts once."""
    tensors = {tensor.data_ptr(): tensor for state in states for tensor in state.tensors().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def failed(error: BaseException) -> QkvError:
    return QkvError(f"the step of this request failed: {error!r}")


def alone(memory: Memory, width: int) -> dict[str, Tensor]:
    """The memory of one text, without padding and with its length."""
    x, lengths = memory["memory"], memory.get("memory_lengths")
    if x.dim() != 3 or len(x) != 1 or x.shape[2] != width:
        raise QkvError(f"a request reads the memory of one text, (1, tokens, {width}), not {tuple(x.shape)}")
    size = x.shape[1] if lengths is None else int(lengths[0])
    return {"memory": x[:, :size], "memory_lengths": torch.tensor([size], device=x.device)}


def together(group: Sequence[Job]) -> State:
    """One state of all that these have read; they let go of theirs, so that pages are written where they are."""
    states = [job.state for job in group if job.state is not None]
    for job in group:
        job.state = None
    if len(states) == 1:
        return states[0]
    room = max(job.need for job in group)
    state = states.pop(0).fork(room=room)
    while states:
        state.join(states.pop(0).fork(room=room))
    return state
