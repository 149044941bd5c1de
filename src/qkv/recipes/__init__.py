"""The recipes that come with the package; finding one imports no torch."""

from importlib.resources import files
from pathlib import Path

from qkv.errors import QkvError
from qkv.spec import nearest


def shipped() -> dict[str, Path]:
    """Name → file."""
    paths = sorted(Path(str(file)) for file in files("qkv.recipes").iterdir())
    return {path.stem: path for path in paths if path.suffix == ".toml"}


def find(name: str) -> Path:
    """The file of a recipe: a path to a TOML file, or the name of a shipped one."""
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise QkvError(f"there is no recipe file {path}; `qkv recipes` lists the shipped ones")
        return path
    found = shipped()
    if name not in found:
        raise QkvError(f"no recipe is called {name!r}{nearest(name, found)}")
    return found[name]
