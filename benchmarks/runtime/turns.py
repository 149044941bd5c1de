"""Forms of the same work, each in a process of its own, measured in turn: A B C A B C …

A form's process waits without a thread at work while another is measured, none sees another's libraries, and one that
is not installed, or breaks, leaves the others to go on.
"""

import csv
import dataclasses as dc
import datetime
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import machine

from qkv.look.limits import Limits, measure_limits

SPAWN = multiprocessing.get_context("spawn")
Measured = dict[str, float]
"""Unit → figure: a rate such as tokens/s, or s, or MB."""


@dc.dataclass(frozen=True)
class Settings:
    """What holds for every work of a run."""

    threads: int
    rounds: int
    quick: bool
    """As little as shows that everything works; its figures mean nothing."""
    folder: Path
    """For files that are made on the way; it is removed at the end."""
    csv: Path | None = None
    without: tuple[str, ...] = ()
    """Forms whose name holds one of these words are left out."""

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dc.dataclass(frozen=True)
class Ready:
    """A form that can be measured."""

    measure: Callable[[], Measured]
    output: Callable[[], Any] = lambda: None
    """What it computed when it was measured, to be held against what others do."""


@dc.dataclass(frozen=True)
class Form:
    """One way to do a work. `build(threads, *arguments)` makes it ready, in its own process."""

    name: str
    package: str
    """The distribution that does it."""
    build: Callable[..., Ready]
    arguments: tuple[Any, ...] = ()

    @property
    def ours(self) -> bool:
        return self.package == "qkv"


@dc.dataclass(frozen=True)
class Work:
    """Something that several forms do, and what qkv is to reach."""

    name: str
    forms: Sequence[Form]
    mark: str
    alike: Callable[[Any, Any], str] | None = None
    """Says how like an output is to that of the form `truth`."""
    truth: str = ""


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives, called in a process of its own."""
    with ProcessPoolExecutor(1, SPAWN, quiet) as pool:
        return pool.submit(function, *arguments).result()


# --- the processes ---


def quiet() -> None:
    """What other packages advise is not for whoever reads a table."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def serve(pipe: Connection, form: Form, threads: int) -> None:
    """Make a form ready, and measure it as often as is asked."""
    quiet()
    try:
        ready = form.build(threads, *form.arguments)
        ready.measure()  # what is slow only the first time
        pipe.send(("ready", ready.output()))
        while pipe.recv():
            pipe.send(("measured", ready.measure()))
    except ImportError as fault:
        pipe.send(("missing", str(fault)))
    except Exception as fault:
        if os.environ.get("QKV_TRACEBACK"):
            traceback.print_exc()
        pipe.send(("failed", f"{type(fault).__name__}: {str(fault).splitlines()[0] if str(fault) else ''}"))


class Contender:
    """A form in its process."""

    def __init__(self, form: Form, threads: int) -> None:
        self.form = form
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, form, threads), daemon=False)
        self.process.start()
        theirs.close()
        self.state, self.said = self.answer()

    @property
    def running(self) -> bool:
        return self.state in ("ready", "measured")

    def answer(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return "failed", f"its process ended with {self.process.exitcode}"

    def measure(self) -> Measured | None:
        self.pipe.send(True)
        self.state, said = self.answer()
        if self.state != "measured":
            self.said = said
            return None
        return said

    def close(self) -> None:
        if self.running:
            self.pipe.send(False)
        self.process.join()

    def complaint(self) -> str:
        if self.state == "missing":
            return f"{self.form.name} is left out: pip install {self.form.package} ({self.said})"
        return f"{self.form.name} is left out: {self.said}"


# --- comparing ---


def compare(work: Work, settings: Settings) -> None:
    """Measure the forms of a work in turn, print the table, and add it to the CSV file."""
    print(f"\n{work.name}; to reach: {work.mark}", flush=True)
    contenders, found = [], dict[str, list[Measured]]()
    try:
        for form in work.forms:
            if any(word in form.name for word in settings.without):
                continue
            contenders.append(Contender(form, settings.threads))
        outputs = {one.form.name: one.said for one in contenders if one.state == "ready"}
        before = measure_limits(settings.threads)
        for _ in range(settings.rounds):
            for one in contenders:
                if one.running and (value := one.measure()) is not None:
                    found.setdefault(one.form.name, []).append(value)
        after = measure_limits(settings.threads)
    finally:
        for one in contenders:
            one.close()
    for one in contenders:
        if not one.running:
            print(f"  {one.complaint()}")
            found.pop(one.form.name, None)
    print(f"  before: {before}\n  after:  {after}")
    forms = [form for form in work.forms if form.name in found]
    rows = [row for unit in units(found) for row in table(work, forms, found, unit, outputs)]
    if settings.csv is not None:
        append(settings.csv, [common(work, settings, before, after) | row for row in rows])


def units(found: Mapping[str, list[Measured]]) -> list[str]:
    return list(dict.fromkeys(unit for rounds in found.values() for one in rounds for unit in one))


def table(
    work: Work, forms: Sequence[Form], found: Mapping[str, list[Measured]], unit: str, outputs: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Print the figures of one unit, and of ours the ratios to the others' in the same round; also as CSV's rows."""
    values = {form.name: [one[unit] for one in found[form.name]] for form in forms}
    rows = []
    print(f"  {unit:34}{'median':>10}{'min':>10}{'max':>10}")
    for form in forms:
        note = ""
        if work.alike is not None and work.truth in outputs and form.name != work.truth:
            note = work.alike(outputs[form.name], outputs[work.truth])
        rows.append({"form": form.name, "unit": unit, "version": told(form), "note": note} | spread(values[form.name]))
        print(f"  {f'{form.name} {told(form)}':34}{figures(rows[-1])}  {note}".rstrip())
    for ours in (form for form in forms if form.ours):
        for other in (form for form in forms if not form.ours):
            ratios = [a / b for a, b in zip(values[ours.name], values[other.name], strict=True)]
            rows.append({"form": f"{ours.name} ÷ {other.name}", "unit": f"× {unit}"} | spread(ratios))
            print(f"  {rows[-1]['form']:34}{figures(rows[-1])}")
    return rows


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def figures(row: Mapping[str, Any]) -> str:
    return "".join(f"{row[name]:>10.{2 if row['median'] < 100 else 0}f}" for name in ("median", "min", "max"))


def told(form: Form) -> str:
    """The version of a form's package; of qkv also the commit."""
    try:
        found = version(form.package)
    except PackageNotFoundError:
        return ""
    return f"{found} {commit()}".strip() if form.ours else found


@cache
def commit() -> str:
    """Of this checkout, with a + where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- the file ---

COLUMNS = [
    "date", "machine", "python", "torch", "threads", "rounds", "work", "form", "version", "unit", "median", "min",
    "max", "note", "mark", "read_gb_s", "fp32_gop_s", "bf16_gop_s", "int8_gop_s", "read_gb_s_after",
]  # fmt: skip


def common(work: Work, settings: Settings, before: Limits, after: Limits) -> dict[str, Any]:
    """What all rows of a work share."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"), "machine": machine(),
        "python": sys.version.split()[0], "torch": version("torch"), "threads": settings.threads,
        "rounds": settings.rounds, "work": work.name, "mark": work.mark,
        "read_gb_s": before.bandwidth / 1e9, "read_gb_s_after": after.bandwidth / 1e9,
        **{f"{kind}_gop_s": rate / 1e9 for kind, rate in before.products.items()},
    }  # fmt: skip


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a CSV file, which is begun if it is not there."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in row.items()})
