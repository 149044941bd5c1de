"""qkv: the whole Transformer family from one set of parts.

>>> import qkv
>>> model = qkv.load("smollm2-135m-instruct")     # a name, a directory, a .gguf file, or a run
>>> print(model.spec)                             # Python that rebuilds it
>>> spec = qkv.edit(model.spec, "**.norm", qkv.parts.RMSNorm())
>>> print(*qkv.diff(model.spec, spec), sep="\\n")
>>> model = spec.build()

Importing this module imports no torch: what needs it is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qkv.errors import QkvError
from qkv.spec import Spec, diff, dump, edit, part

if TYPE_CHECKING:
    from qkv import adapt, decode, masks, models, parts, train, use, zoo
    from qkv.checkpoints.export import save_pretrained
    from qkv.context import Tap
    from qkv.look.inspection import inspect
    from qkv.native import fast, slow
    from qkv.train.run import Run, load
    from qkv.train.run import open_task as open
    from qkv.use import Task
    from qkv.zoo import spec_of as preset

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "QkvError", "Run", "Spec", "Tap", "Task", "adapt", "decode", "diff", "dump", "edit", "fast", "inspect", "load",
    "masks", "models", "open", "part", "parts", "preset", "save_pretrained", "slow", "train", "use", "zoo",
]
# fmt: on

_LATER = {
    "Run": ("qkv.train", "Run"),
    "Tap": ("qkv.context", "Tap"),
    "Task": ("qkv.use", "Task"),
    "fast": ("qkv.native", "fast"),
    "inspect": ("qkv.look.inspection", "inspect"),
    "load": ("qkv.train.run", "load"),
    "open": ("qkv.train.run", "open_task"),
    "save_pretrained": ("qkv.checkpoints.export", "save_pretrained"),
    "preset": ("qkv.zoo", "spec_of"),
    "slow": ("qkv.native", "slow"),
    **{room: (f"qkv.{room}", None) for room in ("adapt", "decode", "masks", "models", "parts", "train", "use", "zoo")},
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'qkv' has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = import_module(module)
    return found if attribute is None else getattr(found, attribute)
