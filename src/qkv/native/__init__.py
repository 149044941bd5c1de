"""A model as one native program: no Python between the layers.

`fast(model)` flattens what a model's parts do into a list of records over packed weights, which a small library of
kernels (`kernels/`, C++, compiled for this processor when it is first needed) runs on any rows of (token, position,
text): decoding, batches and whole prompts are one path. Kernels know parts, never families; a part without a lowering
leaves the model as it is, and says so.
"""

from qkv.native import memory as memory  # registers what it lowers
from qkv.native.fast import fast, slow

__all__ = ["fast", "slow"]
