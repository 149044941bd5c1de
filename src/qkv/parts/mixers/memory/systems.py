"""The published systems: each is one row of a table, a `Memory` with another decay, rule and feature.

| system | decay e^g | rule | feature | around it |
|---|---|---|---|---|
| LinearAttention | 1 | add, normalised | elu + 1 | |
| Retention | constant of the head | add | | rotary, norm, silu gate |
| GatedRetention | number of the token | add | | rotary, norm, silu gate |
| GLA | vector of the token | add | | norm, silu gate |
| HGRN2 | vector of the token, k = 1 − e^g | add | silu | norm |
| MLSTM | number of the token | exponential | | norm, sigmoid gate |
| DeltaNet | 1 | delta | silu, length 1 | convolution, norm |
| GatedDeltaNet | number of the token | delta | silu, length 1 | convolution, norm, silu gate |
| KDA | vector of the token | delta | silu, length 1 | convolution, norm, sigmoid gate of low rank |

`.memory(width)` gives the row itself, to be edited further: `GLA(4).memory(512)`.
"""

from qkv.errors import QkvError
from qkv.parts.mixers.body import Body, Mixer
from qkv.parts.mixers.memory.decay import PerChannel, PerHead, PerToken, StepSize, Tied
from qkv.parts.mixers.memory.feature import Pointwise, Positive, Unit
from qkv.parts.mixers.memory.memory import Memory
from qkv.parts.mixers.memory.rule import Add, Delta, Exponential
from qkv.parts.norm import LayerNorm, RMSNorm
from qkv.parts.position import EndpointScaling, Rotary
from qkv.spec import part, positive


class System(Mixer):
    """A `Memory` by the name and with the settings that it was published with."""

    heads: int

    def check(self) -> None:
        positive(self, "heads")

    def memory(self, width: int) -> Memory:
        raise AssertionError(f"{type(self).__name__} does not say which memory it is")

    def build(self, width: int) -> Body:
        return self.memory(width).build(width)


@part("linear-attention")
class LinearAttention(System):
    """o_t = Σ_{j ≤ t} φ(k_j)·φ(q_t) v_j / Σ_{j ≤ t} φ(k_j)·φ(q_t), φ = elu + 1 (Katharopoulos 2020)."""

    heads: int

    def memory(self, width: int) -> Memory:
        return Memory(self.heads, rule=Add(normalise=True), feature=Positive(), norm=None)


@part("retention")
class Retention(System):
    """S_t = γ_h S_{t−1} + k_t v_tᵀ, γ_h = 1 − 2^(−5−h), values twice as wide as keys (Sun 2023, RetNet).

    Its rotary angles end at exactly 1/θ.
    """

    heads: int

    def memory(self, width: int) -> Memory:
        keys = share(width, self.heads)
        rotary = Rotary(scaling=EndpointScaling())
        return Memory(self.heads, value_width=2 * keys, decay=PerHead(), position=rotary, gate="silu")


@part("gated-retention")
class GatedRetention(System):
    """S_t = γ_t S_{t−1} + k_t v_tᵀ, γ_t = σ(W x_t)^(1/16) (Sun 2024, YOCO's gRetNet)."""

    heads: int

    def memory(self, width: int) -> Memory:
        return Memory(self.heads, decay=PerToken(), position=Rotary(), gate="silu")


@part("gla")
class GLA(System):
    """S_t = diag(α_t) S_{t−1} + k_t v_tᵀ, α_t = σ(W_up W_down x_t)^(1/16); keys half as wide as values (Yang 2023)."""

    heads: int

    def memory(self, width: int) -> Memory:
        keys, values = share(width, 2 * self.heads), share(width, self.heads)
        return Memory(
            self.heads, key_width=keys, value_width=values, decay=PerChannel(), norm=RMSNorm(1e-5), gate="silu"
        )


@part("hgrn2")
class HGRN2(System):
    """S_t = diag(f_t) S_{t−1} + (1 − f_t) v_tᵀ, f_t = floor + (1 − floor) σ(W x_t) (Qin 2024)."""

    heads: int
    floor: float = 0.0

    def memory(self, width: int) -> Memory:
        return Memory(self.heads, decay=Tied(self.floor), feature=Pointwise("silu"), norm=RMSNorm(1e-5))


@part("mlstm")
class MLSTM(System):
    """S_t = σ(f_t) S_{t−1} + e^{i_t} k_t v_tᵀ, both gates W x, read as Sᵀq / max(|n·q|, 1) (Beck 2024; 2025, 7B)."""

    heads: int

    def memory(self, width: int) -> Memory:
        keys, values = share(width, 2 * self.heads), share(width, self.heads)
        forget = PerToken(temperature=1.0, cap=15.0, start=(3.0, 6.0))
        write = Exponential(cap=15.0, start=-10.0)
        norm = LayerNorm(1e-6, bias=False)
        return Memory(
            self.heads, key_width=keys, value_width=values, decay=forget, rule=write, norm=norm, gate="sigmoid"
        )


@part("delta-net")
class DeltaNet(System):
    """S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ, β_t = σ(W x_t), |k| = 1 (Schlag 2021, Yang 2024)."""

    heads: int

    def memory(self, width: int) -> Memory:
        return Memory(self.heads, rule=Delta(), feature=Unit(), conv=4, norm=RMSNorm(1e-5))


@part("gated-delta-net")
class GatedDeltaNet(System):
    """S_t = (I − β_t k_t k_tᵀ) γ_t S_{t−1} + β_t k_t v_tᵀ, γ_t = e^(−A Δ_t) (Yang 2024).

    Keys of all heads are ¾ C wide together, values 1½ C.
    """

    heads: int

    def memory(self, width: int) -> Memory:
        keys = share(3 * width, 4 * self.heads)
        return Memory(
            self.heads, key_width=keys, value_width=2 * keys, decay=StepSize(), rule=Delta(), feature=Unit(),
            conv=4, norm=RMSNorm(1e-5), gate="silu",
        )  # fmt: skip


@part("kda")
class KDA(System):
    """S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t−1} + β_t k_t v_tᵀ (Kimi 2025, Kimi Delta Attention).

    Its decay, one number a channel, and its gate go through as many channels as a head has.
    """

    heads: int

    def memory(self, width: int) -> Memory:
        rank = share(width, self.heads)
        return Memory(
            self.heads, decay=StepSize(rank), rule=Delta(), feature=Unit(), conv=4, norm=RMSNorm(1e-5),
            gate="sigmoid", gate_rank=rank,
        )  # fmt: skip


def share(width: int, heads: int) -> int:
    """What each head has of the width."""
    if width % heads:
        raise QkvError(f"{heads} parts do not divide the width {width}; change heads, or take a Memory and its widths")
    return width // heads
