"""`make bench`: run the benchmarks that take minutes, and name those that take hours."""

import ast
import runpy
import sys
from pathlib import Path

SHORT = ("tiled_memory", "training_speed")

here = Path(__file__).parent
for script in sorted([*here.glob("*.py"), *(package.parent for package in here.glob("*/__main__.py"))]):
    if script.stem in ("__main__", "common"):
        continue
    source = script / "__main__.py" if script.is_dir() else script
    first = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").split("\n")[0]
    print(f"\n{'' if script.stem in SHORT else 'not run: '}python -m benchmarks.{script.stem}: {first}", flush=True)
    if script.stem in SHORT:
        sys.argv = [str(script)]
        runpy.run_module(f"benchmarks.{script.stem}", run_name="__main__")
