"""A mixture of experts beside its dense twin of equal compute, learning tiny-shakespeare by characters.

    python -m benchmarks.experts_training [--hidden 512] [--count 8] [--iterations 2000]

The twin's feed-forward is gated and `hidden` wide. The mixture sends each token to 2 of `count` experts half as wide,
with a loss that balances them, so that a token is multiplied with as many weights as in the twin, of which there are
`count` / 2 times as many to learn; what the router and sorting cost is what the tokens a second show. Both learn by the
recipe `write`, with the same text, batches and seed.
"""

import argparse

from benchmarks.mixers import heading, options, trained

ONE_LINE = "model.stack.*.ffn.f"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(recipe="write")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--count", type=int, default=8)
    settings = options(parser)
    hidden, count = settings.hidden, settings.count
    experts = f'{ONE_LINE}={{kind="experts", hidden={hidden // 2}, count={count}}}'
    forms = {
        "dense": [f'{ONE_LINE}={{kind="gated", hidden={hidden}}}'],
        f"2 of {count} experts": [experts, 'objective.auxiliary=[{kind="balance"}]'],
        "without balance": [experts],
    }
    print(f"{'':17}{heading()}")
    for name, lines in forms.items():
        print(f"{name:17}{trained(settings.recipe, [*lines, *settings.set])}   {'  '.join(lines)}", flush=True)


if __name__ == "__main__":
    main()
