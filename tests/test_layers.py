"""Imports point downwards only."""

import ast
from pathlib import Path

import qkv

ORDER = [
    *("cli", "serve", "look", "train", "recipes", "use", "decode", "objectives", "data", "native", "adapt"),
    *("checkpoints", "zoo", "models", "parts", "state", "ops", "context", "masks", "spec", "errors"),
]
ROOT = Path(qkv.__file__).parent


def imports(file: Path) -> set[str]:
    """The rooms of this package that a file imports when it runs; a check for types alone does not count."""
    found: set[str] = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "qkv":
            names = [f"qkv.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("qkv.")}
    return found


def test_every_file_stands_in_a_room_and_imports_downwards():
    for file in sorted(ROOT.rglob("*.py")):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        assert room in ORDER, f"{file} stands in no room of the house"
        below = set(ORDER[ORDER.index(room) :])
        assert imports(file) <= below, f"{file} imports upwards: {sorted(imports(file) - below)}"


def test_no_file_is_longer_than_a_sitting():
    long = {str(f): n for f in ROOT.rglob("*.py") if (n := len(f.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long
