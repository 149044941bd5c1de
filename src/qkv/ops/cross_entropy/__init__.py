"""Cross-entropy of a linear layer's outputs: logits z = x Wᵀ + b, loss −Σₙ Σᵥ t(v | yₙ) log softmax(zₙ)ᵥ.

The target t puts 1 − ε on the label and spreads ε evenly over the vocabulary (label smoothing, Szegedy 2016).
`naive` is the definition; `fused` gives the same value and gradients, a few hundred tokens at a time.
"""

from qkv.ops.cross_entropy.fused import fused
from qkv.ops.cross_entropy.naive import naive

__all__ = ["fused", "naive"]
