"""Pictures and tables of what a model is and does."""

from qkv.look.attention import Attended, attend
from qkv.look.inspect import Inspection, Node, inspect
from qkv.look.pictures import attention_grid, attention_map, curves
from qkv.look.run import report

__all__ = [
    "Attended",
    "Inspection",
    "Node",
    "attend",
    "attention_grid",
    "attention_map",
    "curves",
    "inspect",
    "report",
]
