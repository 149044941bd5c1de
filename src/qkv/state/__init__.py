"""What the caller keeps between calls: one `State` for a batch of rows, which owns lengths and cells."""

from qkv.state.cross import Cross
from qkv.state.kv import KV
from qkv.state.recurrent import Recurrent
from qkv.state.rolling import Rolling
from qkv.state.state import Cell, State

__all__ = ["KV", "Cell", "Cross", "Recurrent", "Rolling", "State"]
