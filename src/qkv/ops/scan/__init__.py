"""The selective scan: every channel carries N numbers that decay and are written at a rate the token decides.

    h_t = e^{Δ_t A} ⊙ h_{t−1} + (Δ_t x_t) B_tᵀ      y_t = h_t C_t

x and Δ (dt) are B T D, A is D N and negative, B and C are B T N, the state h is B D N; y is B T D. This is `recall`
with a head for each channel, one value in each and a decay for each row: too small for matrix products to pay. All is
computed in fp32 at least, the state is kept so. Padding changes nothing where Δ = 0. `first` (1|B T) marks the first
token of each document, before which h is 0. Gu & Dao 2023, Mamba.

One equation, two forms, which agree in values, all gradients and the last state:

    naive     the recurrence read aloud.
    chunked   a segment of tokens at a time; backward recomputes the states of a segment, so that only those between
              segments are kept.
"""

from qkv.ops.scan.chunked import chunked
from qkv.ops.scan.naive import Scanned, naive

__all__ = ["Scanned", "chunked", "naive"]
