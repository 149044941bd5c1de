"""`make bench`: what each script measures, and how to run it."""

import ast
from pathlib import Path

for script in sorted(Path(__file__).parent.glob("*.py")):
    first = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n")[0]
    if not script.name.startswith("_") and script.name != "common.py":
        print(f"python benchmarks/{script.name:24} {first}")
