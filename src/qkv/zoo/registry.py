"""Presets by name: a function that returns a spec, with what it is in its docstring's first line."""

from collections.abc import Callable

from qkv.errors import QkvError
from qkv.models import Model
from qkv.spec import nearest

PRESETS: dict[str, Callable[[], Model]] = {}


def preset(name: str) -> Callable[[Callable[[], Model]], Callable[[], Model]]:
    """Register a function without arguments as the preset of that name."""

    def register(function: Callable[[], Model]) -> Callable[[], Model]:
        PRESETS[name] = function
        return function

    return register


def spec_of(name: str) -> Model:
    """The spec of a preset; `QkvError` where there is none of that name."""
    if name not in PRESETS:
        raise QkvError(f"no preset is called {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]()
