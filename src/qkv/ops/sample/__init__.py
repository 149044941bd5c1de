"""Choosing from a long row x (B V): a vocabulary's scores, or what is made of them.

    argmax    the first i with x_i = max x.
    largest   the k largest and where they stand, largest first; of equal ones any.
    log_p     x_i − log Σ_j e^{x_j}, for some i of each row.
    weights   w_i = e^{(x_i − m)/T}, where m (B 1) is the row's maximum, so that no weight overflows.
    mass      Σ_i w_i (B 1); m + T log Σ_i w_i is T times the logsumexp of x / T.
    draw      the first i with Σ_{j ≤ i} w_j > u Σ_j w_j, for w ≥ 0 and u (B) in [0, 1): i in proportion to w_i.

Two forms, and in both a row's result, to the bit, does not depend on the rows beside it:

    naive     read aloud, a whole row at a time.
    Scores    what is known of blocks of a row says which of its blocks need looking at.
"""

from qkv.ops.sample import naive
from qkv.ops.sample.scores import Scores

__all__ = ["Scores", "naive"]
