"""Speculative decoding against plain: SmolLM2 alone, with prompt look-up, and with drafts made of SmolLM2 itself.

    python -m benchmarks.speculation [--threads 2 --tokens 128 --rounds 3]

Three texts: one that says again what it has read with a change, one that repeats, one that does neither. Two targets:
the file as it is pulled, 4 bits in blocks, and the same weights in bf16. Drafts: the model without some of its middle
layers (self-drafting, Zhang 2023), and for the target in bf16 also the model as int4; the file's weights had 4 bits
before, so that this draft agrees more often than one of weights that had 16. Forms are measured in turn, from a prompt
that the target has read; ratios are medians over rounds of plain's time by the form's, above 1 the form is sooner.
Each form must give the ids that the target alone gives, greedily.
"""

import argparse
import inspect
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pydoc_data.topics import topics

import torch
from benchmarks.common import in_turn, machine, ratio

import qkv
from qkv.adapt import quantise
from qkv.checkpoints.pull import resolve
from qkv.data import ChatTemplate
from qkv.decode import Draft, Greedy, Lookup, Proposer, Session, speculate, stream
from qkv.models import Module
from qkv.use import Task

SMOL = "smollm2-135m-instruct"
Run = Callable[[Session], Iterator[int]]
KEPT = (*range(15), *range(20, 30))
"""The layers of the draft that lacks some: of those tried, the shortest that still agrees with the model mostly."""
PROMPTS = {
    "rewritten code": "Rewrite this code with the function renamed to `shift`:\n\n"
    + inspect.getsource(textwrap.indent),
    "repeated text": "Repeat this text:\n\n" + topics["assert"].strip(),
    "a story": "Tell me a story about a fox.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}, {options.threads} threads, {options.tokens} tokens, {options.rounds} rounds")
    packed = qkv.open(resolve(SMOL), packed=True)
    small = Draft(qkv.fast(without(packed.model, KEPT), options.threads))
    qkv.fast(packed.model, options.threads)
    proposers = {"look-up": Lookup(), f"{len(KEPT)} of its layers": small}
    compare("SmolLM2-135M Q4_1", packed, proposers, options.tokens, options.rounds)

    wide = qkv.open(resolve(SMOL), dtype=torch.bfloat16)
    qkv.fast(wide.model, options.threads)
    fewer = qkv.open(resolve(SMOL)).model
    quantise(fewer, "int4")
    drafts = {"look-up": Lookup(), "itself as int4": Draft(qkv.fast(fewer, options.threads))}
    compare("SmolLM2-135M bf16", wide, drafts, options.tokens, options.rounds)


def without(model: Module, layers: Sequence[int]) -> Module:
    """A model of these layers alone, whose weights are those of the other."""
    made = qkv.edit(model.spec, "stack.depth", len(layers)).build()
    weights = model.state_dict()

    def source(name: str) -> str:
        first, number, *rest = name.split(".")
        return ".".join((first, str(layers[int(number)]), *rest)) if first == "stack" else name

    made.load_state_dict({name: weights[source(name)] for name in made.state_dict()}, assign=True)
    return made.eval()


def compare(name: str, task: Task, proposers: dict[str, Proposer], tokens: int, rounds: int) -> None:
    """Print plain's speed on each text, and how much sooner each proposer makes it."""
    template = ChatTemplate.of(task.target)
    for what, prompt in PROMPTS.items():
        ids = task.ids(template.render([{"role": "user", "content": prompt}]), parse=True)
        truth = list(stream(task.model, ids, Greedy(), limit=tokens))

        def plain(session: Session, ids: list[int] = ids) -> Iterator[int]:
            return stream(task.model, ids, Greedy(), limit=tokens, session=session)

        def sooner(proposer: Proposer, session: Session, ids: list[int] = ids) -> Iterator[int]:
            return speculate(task.model, ids, Greedy(), proposer, limit=tokens, session=session)

        runs: dict[str, Run] = {
            "plain": plain,
            **{form: partial(sooner, proposer) for form, proposer in proposers.items()},
        }
        before = {form: (one.proposed, one.accepted, one.passes, one.tokens) for form, one in proposers.items()}
        times = in_turn({form: partial(seconds, task.model, ids, run, truth) for form, run in runs.items()}, rounds)
        speed = tokens / statistics.median(times["plain"])
        print(f"{name}, {what}, after a prompt of {len(ids)} tokens: plain {speed:.1f} tokens/s", flush=True)
        for form, one in proposers.items():
            now = one.proposed, one.accepted, one.passes, one.tokens
            proposed, accepted, passes, made = (a - b for a, b in zip(now, before[form], strict=True))
            stood = f"{accepted / max(1, proposed):4.0%} of {proposed // rounds} proposals stood"
            print(
                f"  {form:18} {ratio(times['plain'], times[form]):5.2f} ×   {stood}, {made / passes:.1f} tokens a pass"
            )


def seconds(model: Module, ids: list[int], run: Run, truth: list[int]) -> float:
    """How long a form takes from a prompt that has been read, all of it but for its last token."""
    session = Session(model)
    session.feed(ids, len(ids) + len(truth))
    began = time.perf_counter()
    made = list(run(session))
    took = time.perf_counter() - began
    if made != truth:
        raise SystemExit("the ids are not those of plain greedy decoding")
    return took


if __name__ == "__main__":
    main()
