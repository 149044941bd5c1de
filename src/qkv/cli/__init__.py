"""The command line: thin commands that parse, call and show. Nothing heavy is imported before a command runs."""

from qkv.cli.program import main

__all__ = ["main"]
