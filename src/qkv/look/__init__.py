"""Pictures and tables of what a model is and does."""

from qkv.look.attention import Attended, attend
from qkv.look.differences import differences
from qkv.look.inspection import Inspection, Node, inspect
from qkv.look.pictures import attention_grid, attention_map, curves
from qkv.look.routing import Routing, route, routing_map
from qkv.look.run import write_report

__all__ = [
    "Attended",
    "Inspection",
    "Node",
    "Routing",
    "attend",
    "attention_grid",
    "attention_map",
    "curves",
    "differences",
    "inspect",
    "route",
    "routing_map",
    "write_report",
]
