"""A memory that is written, decays and is read: the recurrence behind every mixer of linear time.

    S_t = (I − β_t k_t k_tᵀ) (e^{g_t} ⊙ S_{t−1}) + β_t k_t v_tᵀ      o_t = S_tᵀ q_t      with β (the delta rule)
    S_t =                     e^{g_t} ⊙ S_{t−1}  +     k_t v_tᵀ      o_t = S_tᵀ q_t      without

Decay first, erase second, write third, read last. Shapes: q and k are B G T K, v is B H T V, the state S is B H K V;
head h reads group h // (H // G). The gate g is the log of the decay, never positive, and −∞ forgets all that came
before (a document's first token): one number for each head (H), one for each token (B H T), or one for each row of
the memory (B H T K); None keeps everything. β is B H T. All is computed in fp32 at least, the state is kept so.
Padding changes nothing where g = 0 and v = 0 (with β: β = 0).

Linear attention has g = None, RetNet a g for each head, Mamba-2 one for each token (q = C, k = B, v = Δx), GLA a
vector; DeltaNet has β and Gated DeltaNet both.

One equation, three forms, which agree in values, all gradients and the last state:

    naive     the recurrence read aloud; `step` is one token of it.
    chunked   matrix products within chunks of tokens, the recurrence only from chunk to chunk; linear in T.
    weights   all tokens are one chunk, and what they read is written out as a T × T matrix of weights.

`running_max` and `bonus` are what mLSTM and RWKV put around it.
"""

from qkv.ops.recall.chunked import chunked
from qkv.ops.recall.naive import Recalled, naive, step
from qkv.ops.recall.weights import weights
from qkv.ops.recall.wrapped import bonus, running_max

__all__ = ["Recalled", "bonus", "chunked", "naive", "running_max", "step", "weights"]
