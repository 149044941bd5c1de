"""Where two models differ."""

from dataclasses import replace

from qkv.models import Model
from qkv.parts import Attention, Branch, Mixer
from qkv.spec import Change, diff, edit, walk


def differences(before: Model, after: Model) -> list[Change]:
    """`diff`, to which a number of key-value heads or a width of heads that is left out is the one it stands for."""
    return diff(shortest(before), shortest(after))


def shortest(spec: Model) -> Model:
    """The same model without the numbers that follow from its width and its heads."""

    def short(f: Mixer) -> Mixer:
        if not isinstance(f, Attention):
            return f
        usual = f.heads * (f.head_width or 0) == getattr(spec, "width", None)
        return replace(
            f, head_width=None if usual else f.head_width, kv_heads=None if f.kv_heads == f.heads else f.kv_heads
        )

    return edit(spec, "**.f", short) if any(isinstance(part, Branch) for _, part in walk(spec)) else spec
