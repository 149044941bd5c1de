"""qkv's native programs against the fastest engines there are, same weights and same machine, in turn.

    python -m benchmarks.runtime [decode prefill batch start sentences translation attention]
    python -m benchmarks.runtime --threads 2 --rounds 5 --csv results.csv
    python -m benchmarks.runtime --without bf16         # where no instruction multiplies bfloats, torch takes minutes

Each work is done by every form in a process of its own, in turn (A B C A B C …), so that a machine whose speed drifts
meets all of them; printed are medians, least and most, of each and of the ratios within a round. What the machine can
do (bytes read, matrices multiplied a second) is measured before and after each work. SmolLM2 and MiniLM come through
`qkv pull`; the translation model is as large as the Transformer of 2017 and has random weights. A peer that is not
installed is named with what installs it, and the others go on.
"""

import argparse
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

WORKS = ("decode", "prefill", "batch", "start", "sentences", "translation", "attention")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", metavar="work", help=f"some of {', '.join(WORKS)}; all by default")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="word", help="leave out forms with these in the name"
    )
    parser.add_argument("--csv", type=Path, help="add the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one round of little work, to see that everything runs")
    options = parser.parse_args()
    unknown = sorted(set(options.works) - set(WORKS))
    if unknown:
        parser.error(f"there is no work {unknown[0]!r}: there are {', '.join(WORKS)}")
    # Before anything that reads them is imported, here and in the forms' processes.
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

    import torch
    from benchmarks.runtime.turns import Settings, compare, machine

    torch.set_num_threads(options.threads)
    print(f"{machine()}, with {options.threads} of them; Python {sys.version.split()[0]}, torch {torch.__version__}")
    if options.quick:
        print("a quick run: it shows that everything runs, and its figures mean nothing")
    with tempfile.TemporaryDirectory() as folder:
        rounds = 1 if options.quick else options.rounds
        settings = Settings(options.threads, rounds, options.quick, Path(folder), options.csv, tuple(options.without))
        for name in options.works or WORKS:
            for work in import_module(f"benchmarks.runtime.{name}").works(settings):
                compare(work, settings)


if __name__ == "__main__":
    main()
