"""The program `qkv`, and what its exit status says: 0 done, 2 the user's mistake, 1 ours, 130 Ctrl-C."""

import errno
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer

import qkv
from qkv.cli import bench, convert, look, pull, run, train, use
from qkv.errors import QkvError

app = typer.Typer(
    name="qkv",
    help="The whole Transformer family from one set of parts: train, run and look inside.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def minded(command: Callable[..., None]) -> Callable[..., None]:
    """A command that may be cut off, before typer, which says nothing, hears of it."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            fail("stopped", 130)
        except BrokenPipeError:
            # The reader of our output left (`qkv … | head`): no one to tell, and nothing more to flush.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    return run


for group in (train, run, use, look, bench, convert, pull):
    for command in group.COMMANDS:
        app.command()(minded(command))


def version(asked: bool) -> None:
    if asked:
        typer.echo(f"qkv {qkv.__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False,
) -> None:
    if traceback:
        os.environ["QKV_TRACEBACK"] = "1"


def main() -> None:
    """Run a command; an error is one sentence on stderr, with `--traceback` the rest."""
    try:
        app()
    except QkvError as mistake:
        fail(str(mistake), 2)
    except OSError as fault:
        if fault.errno in THEIRS:
            fail(f"{fault.filename or 'the output'} could not be written or read ({fault.strerror})", 2)
        defect(fault)
    except Exception as fault:
        defect(fault)


THEIRS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
"""Faults of a disk or a path."""


def defect(fault: Exception) -> NoReturn:
    fail(f"this is a defect of qkv: {type(fault).__name__}: {fault} (--traceback shows where)", 1)


def fail(message: str, code: int) -> NoReturn:
    if os.environ.get("QKV_TRACEBACK"):
        import traceback

        traceback.print_exc()
    print(f"qkv: {message}", file=sys.stderr)
    sys.exit(code)
