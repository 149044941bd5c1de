"""Training speed of the Transformer of 2017 in qkv, in torch.nn.Transformer and in the transformers package (Marian).

    python -m benchmarks.training_speed [--precision bf16 --threads 2]
    python -m benchmarks.training_speed --preset transformer-base --batches 4 --rounds 3

The three models compute the same function, with the same dropout, from the same number of trained weights, and learn
with the same optimiser. A step is forward, loss with label smoothing 0.1, backward, clipping and AdamW (fused). It
begins with the same object for all, a padded batch of ids; masks and whatever else a model needs are made within it.
The peers do no work that they can do without: no mask of padding at the end of causal rows, which nothing sees; no
cache; no dropout of attention weights, which goes a slower way. Under bf16 (autocast) every loss is taken in fp32.

Two comparisons, in which each model sees every sentence once a round:

    same batches         all read qkv's own batches of like length, so that only the code differs
    each its own way     the peers read as many sentences a batch as qkv does on average, drawn at random and padded,
                         as their tutorials do

Rounds go qkv, torch, Marian, qkv, …; printed are medians, and medians of the ratios within a round.
"""

import argparse
import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from benchmarks.common import DATA, in_turn, machine, ratio
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from qkv.data import BPE, Batch, Data, Tokenizer, pad_rows
from qkv.models import EncoderDecoder
from qkv.objectives import Seq2Seq
from qkv.parts import Attention, FeedForward
from qkv.train import AdamW, Recipe, Train, Trainer, start
from qkv.zoo import spec_of

SMOOTHING, CLIP, VOCABULARY = 0.1, 1.0, 10_000


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(start(recipe(options), Path(folder), Path()))
    tokenizer, sizes = trainer.run.tokenizers.target, Sizes(trainer.recipe.model)
    peers = {"torch.nn.Transformer": TorchTransformer(sizes, tokenizer), "Marian": Marian(sizes, tokenizer)}
    ours = [next(trainer.examples.training) for _ in range(options.batches)]
    theirs = at_random(ours, tokenizer.pad)
    settings(options, sizes, {"qkv": trainer.model, **peers}, ours, theirs)
    steps = {"qkv": Qkv(trainer), **{name: Peer(model, trainer, tokenizer.pad) for name, model in peers.items()}}
    forms = {("same batches", name): timed(step, ours) for name, step in steps.items()}
    forms |= {("each its own way", name): timed(steps[name], theirs) for name in peers}
    for run in forms.values():
        run()  # what is slow only the first time
    seconds = in_turn(forms, options.rounds)
    seconds["each its own way", "qkv"] = seconds["same batches", "qkv"]  # its own way is the same
    report(seconds, list(steps), sum(batch.tokens for batch in ours))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = DATA / "multi30k"
    presets = ("transformer-tiny", "transformer-small", "transformer-base")
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument("--source", type=Path, default=folder / "train.en.gz", help="a sentence a line, also .gz")
    parser.add_argument("--target", type=Path, default=folder / "train.de.gz", help="its translations, line by line")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=4096, help="of the larger padded side of qkv's batches")
    parser.add_argument("--batches", type=int, default=8, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for path in (options.source, options.target):
        if not path.exists():
            sys.exit(f"{path} is missing: give two parallel text files with --source and --target")
    return options


# --- models and steps ---------------------------------------------------------------------------------------------


def recipe(options: argparse.Namespace) -> Recipe:
    """What qkv trains; the column of a plain text file is named by the file's ending."""
    files = options.source.resolve(), options.target.resolve()
    source, target = (path.name.removesuffix(".gz").rpartition(".")[2] for path in files)
    tokenizer = BPE(VOCABULARY, lowercase=True)
    return Recipe(
        model=spec_of(options.preset),
        data=Data(tuple(map(str, files)), source=source, target=target, tokenizer=tokenizer),
        objective=Seq2Seq(label_smoothing=SMOOTHING),
        optimizer=AdamW(lr=1e-3),
        train=Train(10**9, tokens_per_batch=options.tokens, clip=CLIP, precision=options.precision, device="cpu"),
    )


class Sizes:
    """The numbers of a preset, with which to build the same model elsewhere."""

    def __init__(self, spec: EncoderDecoder) -> None:
        branches = spec.encoder.layers[0].branches
        attention, ffn = branches["attn"].f, branches["ffn"].f
        assert isinstance(attention, Attention) and isinstance(ffn, FeedForward)
        self.width, self.depth, self.heads, self.hidden = spec.width, spec.encoder.depth, attention.heads, ffn.hidden
        self.dropout = branches["attn"].dropout

    def __str__(self) -> str:
        return (
            f"{self.depth} + {self.depth} layers, {self.width} wide, {self.heads} heads, {self.hidden} hidden, "
            f"dropout {self.dropout}"
        )


class TorchTransformer(nn.Module):
    """PyTorch's own module, with embedding, positions, masks and output as in its translation tutorial."""

    def __init__(self, sizes: Sizes, tokenizer: Tokenizer) -> None:
        super().__init__()
        C, self.pad, self.scale = sizes.width, tokenizer.pad, math.sqrt(sizes.width)
        self.embed = nn.Embedding(tokenizer.size, C, padding_idx=tokenizer.pad)
        nn.init.normal_(self.embed.weight, std=C**-0.5)
        self.dropout = nn.Dropout(sizes.dropout)
        self.transformer = nn.Transformer(
            C, sizes.heads, sizes.depth, sizes.depth, sizes.hidden, sizes.dropout, batch_first=True, norm_first=False
        )
        self.without_extras()
        angle = torch.arange(1000)[:, None] * torch.exp(torch.arange(0, C, 2) * (-math.log(10000) / C))
        self.register_buffer("positions", torch.stack((angle.sin(), angle.cos()), -1).flatten(1))

    def without_extras(self) -> None:
        """It has two norms and two kinds of dropout that the paper has not: without them the work is the same."""
        self.transformer.encoder.norm = self.transformer.decoder.norm = None
        for module in self.transformer.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            elif isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = 0.0

    def embedded(self, ids: Tensor) -> Tensor:
        return self.dropout(self.embed(ids) * self.scale + self.positions[: ids.shape[1]])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        padding = source == self.pad
        x = self.transformer(
            self.embedded(source),
            self.embedded(target),
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(target.shape[1]),
            tgt_is_causal=True,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return nn.functional.linear(x, self.embed.weight)


class Marian(nn.Module):
    """MarianMTModel, called with what the package's own collator for such models makes of a batch."""

    def __init__(self, sizes: Sizes, tokenizer: Tokenizer) -> None:
        super().__init__()
        config = MarianConfig(
            vocab_size=tokenizer.size, d_model=sizes.width, encoder_layers=sizes.depth, decoder_layers=sizes.depth,
            encoder_attention_heads=sizes.heads, decoder_attention_heads=sizes.heads,
            encoder_ffn_dim=sizes.hidden, decoder_ffn_dim=sizes.hidden, activation_function="relu",
            dropout=sizes.dropout, attention_dropout=0.0, activation_dropout=0.0, scale_embedding=True,
            pad_token_id=tokenizer.pad, bos_token_id=tokenizer.begin, eos_token_id=tokenizer.end,
            forced_eos_token_id=None, decoder_start_token_id=tokenizer.begin,
            attn_implementation="sdpa",
        )  # fmt: skip
        self.pad, self.model = tokenizer.pad, MarianMTModel(config).train()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.model(
            source, attention_mask=(source != self.pad).long(), decoder_input_ids=target, use_cache=False
        ).logits


Step = Callable[[Batch], object]


class Qkv:
    """A step of qkv: the objective's example of the batch, and the trainer's own step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.examples = trainer, trainer.examples

    def __call__(self, batch: Batch) -> float:
        example = self.trainer.recipe.objective.example(batch, self.examples.vocabulary, self.examples.generator)
        return self.trainer.learn([example])


class Peer:
    """A step as PyTorch's tutorials write it; the optimiser is built by the same recipe."""

    def __init__(self, model: nn.Module, trainer: Trainer, pad: int) -> None:
        self.model, self.bf16 = model, trainer.settings.precision == "bf16"
        self.optimizer = trainer.recipe.optimizer.build(model)
        self.criterion = nn.CrossEntropyLoss(ignore_index=pad, label_smoothing=SMOOTHING)

    def __call__(self, batch: Batch) -> float:
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            logits = self.model(batch.source, batch.target[:, :-1])
            loss = self.criterion(logits.flatten(0, 1), batch.target[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


# --- measuring ----------------------------------------------------------------------------------------------------


def at_random(batches: Sequence[Batch], pad: int) -> list[Batch]:
    """The sentences of these batches in as many others of the same number of sentences, drawn at random."""
    sources = [row[:n] for b in batches for row, n in zip(b.source.numpy(), b.source_lengths, strict=True)]
    targets = [row[:n] for b in batches for row, n in zip(b.target.numpy(), b.target_lengths, strict=True)]
    index = torch.cat([batch.index for batch in batches])
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    cuts = [len(order) * n // len(batches) for n in range(len(batches) + 1)]
    drawn = [order[start:end] for start, end in pairwise(cuts)]
    return [
        Batch(*pad_rows([sources[n] for n in rows], pad), *pad_rows([targets[n] for n in rows], pad), index[rows])
        for rows in drawn
    ]


def timed(step: Step, batches: Sequence[Batch]) -> Callable[[], float]:
    """A function that takes a step on each batch and returns the seconds of it."""

    def run() -> float:
        began = time.perf_counter()
        for batch in batches:
            step(batch)
        return time.perf_counter() - began

    return run


def settings(
    options: argparse.Namespace, sizes: Sizes, models: dict[str, nn.Module], ours: list[Batch], theirs: list[Batch]
) -> None:
    def padding(batches: list[Batch]) -> float:
        held = sum(batch.source.numel() + batch.target[:, 1:].numel() for batch in batches)
        return 1 - sum(int(batch.source_lengths.sum()) + batch.tokens for batch in batches) / held

    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    print(f"{machine()}, {options.threads} threads; torch {version('torch')}, transformers {version('transformers')}")
    print(f"{options.preset}: {sizes}; vocabulary {VOCABULARY:,}, {options.precision}")
    print(f"label smoothing {SMOOTHING}, gradients clipped to {CLIP}, AdamW (fused)")
    print("trained weights: " + ", ".join(f"{name} {count:,}" for name, count in trained.items()))
    sentences, tokens = sum(len(batch.target) for batch in ours), sum(batch.tokens for batch in ours)
    print(f"a round: {len(ours)} batches, {sentences:,} sentences, {tokens:,} target tokens")
    print(f"padding: {padding(ours):.1%} in batches of like length, {padding(theirs):.1%} in batches at random")
    print(f"medians of {options.rounds} rounds of target tokens a second, padding not counted\n")


def report(seconds: dict[tuple[str, str], list[float]], names: list[str], tokens: int) -> None:
    print(f"{'':22}{'tokens/s':>10}{'qkv ÷ this':>12}")
    for mode in ("same batches", "each its own way"):
        print(mode)
        ratios = {name: ratio(seconds[mode, name], seconds[mode, "qkv"]) for name in names}
        for name in names:
            print(f"  {name:20}{tokens / median(seconds[mode, name]):10,.0f}{ratios[name]:12.2f}")
        print(f"  {'qkv ÷ the better peer':30}{min(ratios[name] for name in names[1:]):12.2f}")


if __name__ == "__main__":
    main()
