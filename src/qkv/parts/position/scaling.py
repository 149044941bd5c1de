"""How the rates of rotary positions are changed, to read texts longer than those that a model was trained on."""

import math

import torch
from torch import Tensor

from qkv.errors import QkvError
from qkv.spec import Spec, part, positive


def spans(theta: float | Tensor, width: int, like: Tensor) -> Tensor:
    """s_i = θ^(2i/K), i < K/2: the tokens in which pair i turns by one radian; dtype and device are those of `like`."""
    return theta ** (torch.arange(0, width, 2, dtype=like.dtype, device=like.device) / width)


class Scaling(Spec):
    """The rates r_i, radians per token, of the K/2 pairs of a head; without a scaling they are 1 / s_i = θ^(−2i/K).

    `trained` is how many tokens long the texts were that the model was trained on. Two scalings, `NTKScaling` and
    `LongRope`, depend on how long the text is. Their rule is: the tokens of one pass turn at the rates of their row's
    length at the end of that pass, padding not counted. So a pass over a whole text has the rates of its length, and no
    row depends on those beside it. As long as a row has not outgrown `trained`, feeding it in pieces gives what feeding
    it whole gives. Beyond that no cache can: keys keep the rotation with which they were written, as in the reference
    library, while a pass over the whole would turn them all anew. Where that matters, feed a row that crosses `trained`
    again from its beginning.
    """

    def fits(self, width: int) -> None:
        """Raise `QkvError` if heads of which `width` values are turned cannot be scaled so."""

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        """`lengths`: 1|B 1 1, floating → K/2, or 1|B 1 K/2 where the rates depend on them."""
        raise AssertionError(f"{type(self).__name__} does not say what its rates are")

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by: scores grow by its square."""
        return 1.0


@part("linear-scaling")
class LinearScaling(Scaling):
    """r_i = 1 / (factor s_i): position t is read as t / factor (position interpolation, Chen 2023)."""

    factor: float

    def check(self) -> None:
        positive(self, "factor")

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        return 1 / spans(theta, width, lengths) / self.factor


@part("endpoint-scaling")
class EndpointScaling(Scaling):
    """r_i = θ^(−2i/(K−2)): from 1 to 1/θ with both ends (Sun 2023, RetNet's code)."""

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        at = torch.linspace(0, 1, width // 2, dtype=lengths.dtype, device=lengths.device)
        return theta**-at


@part("ntk-scaling")
class NTKScaling(Scaling):
    """θ grows with the length n of the text: θ (factor n / trained − (factor − 1))^(K/(K−2)) where n > trained.

    The slowest pair is then interpolated and the fastest left alone ("NTK-aware", bloc97 2023; with n "dynamic NTK",
    emozilla 2023; Peng 2023, appendix B.2). See `Scaling` for what a cache does past `trained`.
    """

    factor: float
    trained: int

    def check(self) -> None:
        positive(self, "factor", "trained")

    def fits(self, width: int) -> None:
        if width <= 2:
            raise QkvError(f"ntk-scaling needs heads of which more than 2 values are turned, not {width}")

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        growth = self.factor * lengths.clamp(min=self.trained) / self.trained - (self.factor - 1)
        return 1 / spans(theta * growth ** (width / (width - 2)), width, lengths)


@part("band-scaling")
class BandScaling(Scaling):
    """Long waves are slowed by `factor`, short ones kept, and those between blended: r_i = ((1 − b)/factor + b) / s_i.

    b = (trained / λ_i − low) / (high − low), kept in [0, 1], with the wavelength λ_i = 2π s_i in tokens (Dubey 2024):
    a pair that makes fewer than `low` turns in `trained` tokens is slow, one that makes more than `high` is not.
    """

    factor: float
    low: float
    high: float
    trained: int

    def check(self) -> None:
        positive(self, "factor", "low", "high", "trained")
        if self.low >= self.high:
            raise QkvError(f"band-scaling needs low below high, not {self.low} and {self.high}")

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        rates = 1 / spans(theta, width, lengths)
        turns = self.trained / (2 * math.pi / rates)
        blend = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - blend) * rates / self.factor + blend * rates


@part("yarn")
class YaRN(Scaling):
    """Pairs that turn often over the trained length keep their rate, slow ones are interpolated (YaRN, Peng 2023).

    r_i = (1 − b) / (factor s_i) + b / s_i, where b falls linearly from 1 at the pair that makes `fast` turns in
    `trained` tokens to 0 at the one that makes `slow`; `truncate` rounds these two outwards to whole pairs. cos and sin
    are multiplied by `attention_factor`: if it is None, by m(1) with m(a) = 0.1 a ln factor + 1, or where both numbers
    are given by m(numerator) / m(denominator).
    """

    factor: float
    trained: int
    fast: float = 32.0
    slow: float = 1.0
    attention_factor: float | None = None
    numerator: float | None = None
    denominator: float | None = None
    truncate: bool = True

    def check(self) -> None:
        positive(self, "factor", "trained", "fast", "slow", "attention_factor", "numerator", "denominator")
        if self.slow > self.fast:
            raise QkvError(f"yarn needs slow no larger than fast, not {self.slow} and {self.fast}")

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        first, last = (self.pair(turns, theta, width) for turns in (self.fast, self.slow))
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        ramp = (torch.arange(width // 2, dtype=lengths.dtype, device=lengths.device) - first) / (last - first or 0.001)
        blend, s = 1 - ramp.clamp(0, 1), spans(theta, width, lengths)
        return (1 - blend) * (1 / (self.factor * s)) + blend * (1 / s)

    def pair(self, turns: float, theta: float, width: int) -> float:
        """The pair, between two as a rule, that makes so many turns in `trained` tokens."""
        return width * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(max(self.factor, 1.0))
        if self.numerator is not None and self.denominator is not None:
            return (growth * self.numerator + 1) / (growth * self.denominator + 1)
        return growth + 1


@part("long-rope")
class LongRope(Scaling):
    """A divisor of its own for each pair: r_i = 1 / (short_i s_i), or long_i where the text outgrows `trained`.

    cos and sin are multiplied by `attention_factor`, at any length: if it is None by √(1 + ln factor / ln trained)
    (LongRoPE, Ding 2024). See `Scaling` for what a cache does past `trained`.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained: int
    factor: float
    attention_factor: float | None = None

    def check(self) -> None:
        positive(self, "short", "long", "factor", "attention_factor")
        if self.trained < 2:
            raise QkvError(f"the trained length of long-rope is at least 2, not {self.trained}")

    def fits(self, width: int) -> None:
        if not len(self.short) == len(self.long) == width // 2:
            found = f"short has {len(self.short)} and long {len(self.long)}"
            raise QkvError(f"long-rope needs {width // 2} numbers for heads of which {width} values turn; {found}")

    def rates(self, theta: float, width: int, lengths: Tensor) -> Tensor:
        short, long = lengths.new_tensor(self.short), lengths.new_tensor(self.long)
        return 1 / (torch.where(lengths > self.trained, long, short) * spans(theta, width, lengths))

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(max(self.factor, 1.0)) / math.log(self.trained))
