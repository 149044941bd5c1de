"""Time of a layer of experts in qkv and in the transformers package's Mixtral block, forward, and forward and backward.

    python -m benchmarks.experts [--widths 512 1024 --tokens 16 512 2048 --precision bf16 --threads 1]

Both have the same weights, 8 experts of which a token goes to 2, and experts twice as wide as the layer unless
`--hidden` says otherwise. The transformers package runs its block in two ways: `eager`, which is what the block does as
it is built, and `grouped_mm`, which its models choose when they are loaded. Forward alone is also shown for what
`qkv.fast` makes of a model of that one layer, in the weights' own precision and with weights of 8 bits.

Rounds go qkv, eager, grouped_mm, qkv, …; a time is the best of the rounds, and the ratios are the median within rounds
of the peer's time over qkv's.
"""

import argparse
import time
from collections.abc import Callable
from importlib.metadata import version

import torch
from benchmarks.common import in_turn, machine, ratio
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import qkv
from qkv.adapt import quantise
from qkv.context import Context
from qkv.models import Sequence
from qkv.parts import Block, Branch, Experts, Stack, Tokens

COUNT, CHOSEN, VOCABULARY = 8, 2, 4096
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 512, 2048])
    parser.add_argument("--hidden", type=float, default=2.0, help="the width of an expert, in widths of the layer")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of weights and activations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    versions = f"torch {torch.__version__}, transformers {version('transformers')}"
    print(f"{CHOSEN} of {COUNT} experts {options.hidden:g} times as wide as the layer, {options.precision}")
    print(f"{machine()}; {versions}, {options.threads} threads; best of {options.rounds} rounds, milliseconds\n")
    peers = f"{'eager ÷ qkv':>13}{'grouped ÷ qkv':>15}"
    print(f"{'':28}{'qkv':>9}{'eager':>9}{'grouped_mm':>12}{peers}{'qkv.fast':>10}{'int8':>8}")
    for width in options.widths:
        forms, programs = layers(width, round(options.hidden * width), options)
        for tokens in options.tokens:
            compare(forms, programs, width, tokens, options)


def layers(
    width: int, hidden: int, options: argparse.Namespace
) -> tuple[dict[str, nn.Module], dict[str, Callable[[Tensor], Tensor]]]:
    """The layer of each form with the same weights; and the programs of a model of that layer alone."""
    dtype = DTYPES[options.precision]
    spec = Sequence(
        width, embed=Tokens(VOCABULARY), stack=Stack(Block(ffn=Branch(Experts(hidden, count=COUNT))), depth=1)
    )
    model = spec.build().to(dtype)
    ours = model.stack.layer(0).ffn.f
    state = {
        "gate.weight": ours.router.score.weight,
        "experts.gate_up_proj": torch.cat((ours.gate, ours.up), 1),
        "experts.down_proj": ours.down,
    }
    state = {name: value.detach().clone() for name, value in state.items()}
    forms: dict[str, nn.Module] = {"qkv": ours}
    for form in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=COUNT, num_experts_per_tok=CHOSEN,
            experts_implementation=form,
        )  # fmt: skip
        forms[form] = MixtralSparseMoeBlock(config).to(dtype)
        forms[form].load_state_dict(state)
    programs = {}
    for name in ("qkv.fast", "int8"):
        copy = spec.build().to(dtype)
        copy.load_state_dict(model.state_dict())
        if name == "int8":
            quantise(copy, "int8")
        programs[name] = qkv.fast(copy, options.threads).hidden
    return forms, programs


def compare(
    forms: dict[str, nn.Module], programs: dict[str, Callable[[Tensor], Tensor]], width: int, tokens: int,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """One shape, without gradients and with them."""
    torch.manual_seed(0)
    x = torch.randn(1, tokens, width, dtype=DTYPES[options.precision])
    ids, context = torch.randint(VOCABULARY, (1, tokens)), Context(torch.arange(tokens)[None])
    calls = {name: (lambda x, form=form: form(x, context)) if name == "qkv" else form for name, form in forms.items()}
    outs = [call(x) for call in calls.values()]
    assert all((out - outs[0]).abs().max() < 0.03 * outs[0].abs().max() for out in outs), "not the same function"
    forward = {name: timed(lambda call=call: call(x)) for name, call in calls.items()}
    forward |= {name: timed(lambda run=run: run(ids)) for name, run in programs.items()}
    show(f"{width} wide, {tokens} tokens", in_turn(forward, options.rounds))
    both = {name: learning(call, x, forms[name]) for name, call in calls.items()}
    show("  and backward", in_turn(both, options.rounds))


def timed(run: Callable[[], object]) -> Callable[[], float]:
    @torch.inference_mode()
    def measure() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    measure()  # what is slow only the first time
    return measure


def learning(call: Callable[[Tensor], Tensor], x: Tensor, form: nn.Module) -> Callable[[], float]:
    seed = torch.randn_like(x)

    def measure() -> float:
        form.zero_grad()
        inputs = x.clone().requires_grad_()
        start = time.perf_counter()
        call(inputs).backward(seed)
        return time.perf_counter() - start

    measure()
    return measure


def show(name: str, seconds: dict[str, list[float]]) -> None:
    best = {form: f"{1e3 * min(times):.1f}" for form, times in seconds.items()}
    eager, kernel = (ratio(seconds[form], seconds["qkv"]) for form in ("eager", "grouped_mm"))
    print(
        f"{name:28}{best['qkv']:>9}{best['eager']:>9}{best['grouped_mm']:>12}{eager:13.2f}{kernel:15.2f}"
        f"{best.get('qkv.fast', ''):>10}{best.get('int8', ''):>8}"
    )


if __name__ == "__main__":
    main()
