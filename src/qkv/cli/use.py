"""Commands that use a model: a run, a checkpoint's directory or file, or a name that `qkv pull` knows."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qkv.cli.engine import Torch, opened
from qkv.cli.run import As_json, NoRepeat, RepetitionPenalty, lines, piped, ruled, ruling, said, sampled
from qkv.errors import QkvError

if TYPE_CHECKING:
    from qkv.decode import Proposer
    from qkv.use import Task

Model = Annotated[
    str, typer.Argument(help="A run, a directory, a .gguf file, or a name such as smollm2-135m-instruct.")
]
Tokens = Annotated[int, typer.Option(help="At most so many new tokens.")]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest tokens that reach p.")]
MinP = Annotated[float | None, typer.Option(help="Sample from tokens at least p times as likely as the best.")]
Seed = Annotated[int | None, typer.Option(help="The seed of the sampling.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. May be repeated.")]
Draft = Annotated[str | None, typer.Option(help="Sooner: a smaller model of the same tokenizer proposes tokens.")]
Lookup = Annotated[
    int | None, typer.Option(help="Sooner: propose what followed so many last tokens, or fewer, earlier in the text.")
]
Adapter = Annotated[list[Path] | None, typer.Option(help="A PEFT LoRA directory to add. May be repeated.")]
Dtype = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; left out, as the file has it, GGUF in fp32.")]


def show(pieces: Iterable[str]) -> str:
    """Print a text as it comes."""
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


def proposing(task: "Task", draft: str | None, lookup: int | None, torch: bool) -> "Proposer | None":
    """What proposes tokens, if an option asks for it."""
    from qkv.decode import Lookup

    if draft is not None and lookup is not None:
        raise QkvError("take either --draft or --lookup: one of them proposes the next tokens")
    if draft is not None:
        return task.draft(opened(draft, torch=torch, quiet=True))
    return None if lookup is None else Lookup(lookup)


def judged(proposer: "Proposer | None") -> None:
    """Say how well what was proposed did."""
    if proposer is not None and proposer.passes:
        share, each = proposer.accepted / max(1, proposer.proposed), proposer.tokens / proposer.passes
        stood = f"{proposer.accepted:,} of {proposer.proposed:,} proposed tokens stood ({share:.0%})"
        print(f"{stood}, {each:.1f} tokens a pass", file=sys.stderr)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue, or - for standard input.")],
    tokens: Tokens = 200,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat: NoRepeat = None,
    stop: Stop = None,
    draft: Draft = None,
    lookup: Lookup = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    torch: Torch = False,
    as_json: As_json = False,
) -> None:
    """Continue a text, printed as it is made. Greedy, unless the checkpoint or an option says otherwise."""
    prompt = piped() if prompt == "-" else prompt
    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampled(asked)  # refuses what cannot be before a model is opened
    rules = ruling(repetition_penalty, no_repeat)
    task = opened(model, dtype, adapter, torch=torch)
    search = ruled(sampled(asked, task.manner.search), task.usual, rules)
    ids = task.encode(prompt)
    proposer = proposing(task, draft, lookup, torch)
    pieces = task.stream(ids, search, tokens=tokens, stop=stop or [], proposer=proposer)
    if as_json:
        print(json.dumps({"prompt": prompt, "text": "".join(pieces)}, ensure_ascii=False))
    else:
        show(pieces)
    judged(proposer)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    tokens: Tokens = 500,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = None,
    repetition_penalty: RepetitionPenalty = None,
    no_repeat: NoRepeat = None,
    draft: Draft = None,
    lookup: Lookup = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    torch: Torch = False,
) -> None:
    """Talk with a model in its own chat template; an empty line or Ctrl-D ends. Piped in, each line is a message."""
    from qkv.use import Chat

    asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    sampled(asked)  # refuses what cannot be before a model is opened
    rules = ruling(repetition_penalty, no_repeat)
    task = opened(model, dtype, adapter, torch=torch)
    proposer = proposing(task, draft, lookup, torch)
    talk = Chat(task, system, ruled(sampled(asked, task.manner.search), task.usual, rules), proposer)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = said(sys.stdin.readline).strip()
        if not line:
            return judged(proposer)
        show(talk.say(line, tokens=tokens))


def embed(
    model: Model,
    file: Annotated[str, typer.Argument(help="A text, a file with one text a line, or - for standard input.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the vectors as a NumPy array (.npy).")] = None,
    similarity: Annotated[bool, typer.Option(help="Print the cosine of each text with each.")] = False,
    batch: Annotated[int, typer.Option(help="So many texts side by side.")] = 32,
    adapter: Adapter = None,
    dtype: Dtype = None,
    torch: Torch = False,
) -> None:
    """Turn texts into vectors: JSON lines, a NumPy array, or how alike the texts are."""
    from qkv.checkpoints.whole import whole_file
    from qkv.use import embed as vectors_of

    if out is not None and out.suffix != ".npy":
        raise QkvError(f"the vectors are written as a NumPy array: name a file that ends in .npy, not {out}")
    texts = lines(file)
    task = opened(model, dtype, adapter, torch=torch)
    vectors = vectors_of(task, texts, batch=batch, cut=True)
    if out is not None:
        import numpy

        with whole_file(out) as part:
            numpy.save(part, vectors.numpy())
        print(out)
    if similarity:
        unit = vectors / vectors.norm(dim=1, keepdim=True)
        for row in (unit @ unit.T).tolist():
            print("\t".join(f"{value:.4f}" for value in row))
    elif out is None:
        for text, vector in zip(texts, vectors.tolist(), strict=True):
            print(json.dumps({"text": text, "vector": [round(value, 7) for value in vector]}, ensure_ascii=False))


def fill(
    model: Model,
    text: Annotated[str, typer.Argument(help="A text with mask tokens, such as: Paris is the [MASK] of France.")],
    best: Annotated[int, typer.Option(help="So many candidates for each mask.")] = 5,
    adapter: Adapter = None,
    dtype: Dtype = None,
    torch: Torch = False,
    as_json: As_json = False,
) -> None:
    """Say what fits best in place of each mask token."""
    import math

    task = opened(model, dtype, adapter, torch=torch)
    for number, found in enumerate(task.candidates(text, best), 1):
        if as_json:
            values = [{"text": one.text, "probability": math.exp(one.score)} for one in found]
            print(json.dumps({"mask": number, "candidates": values}, ensure_ascii=False))
            continue
        print("\n" * (number > 1) + "\n".join(f"{math.exp(one.score):7.4f}  {one.text}" for one in found))


def score(
    model: Model,
    file: Annotated[Path, typer.Argument(help="A text file.")],
    context: Annotated[
        int | None, typer.Option(help="Tokens that the model sees at once; 1,024, or all it takes.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next; half of the context.")] = None,
    adapter: Adapter = None,
    dtype: Dtype = None,
    torch: Torch = False,
    as_json: As_json = False,
) -> None:
    """Perplexity of a text."""
    from qkv.use import score as scored

    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as fault:
        raise QkvError(f"{file} is not UTF-8 (byte {fault.start + 1}); save it as UTF-8") from None
    except OSError as fault:
        raise QkvError(f"{file} cannot be read: {fault.strerror}") from None
    found = scored(opened(model, dtype, adapter, torch=torch), text, context=context, stride=stride)
    values = {
        "perplexity": found.perplexity, "nats_per_token": found.nats / found.tokens,
        "bits_per_byte": found.bits_per_byte, "tokens": found.tokens,
    }  # fmt: skip
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        print(f"{name:15} {value:,.4f}" if isinstance(value, float) else f"{name:15} {value:,}")


COMMANDS = [generate, chat, embed, fill, score]
