"""Labels in any script: tokens made visible, and the font families that have a glyph for every character."""

import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from qkv.errors import QkvError

FIRST = "DejaVu Sans"  # ships with matplotlib, so plain labels look the same on every machine
_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


def require(library: str) -> None:
    """Raise `QkvError` with the line that installs `library` where it is missing."""
    if find_spec(library) is None:
        raise QkvError(f'pictures and reports need {library}, which is not installed: pip install "qkv[look]"')


def shown(token: str, limit: int = 24) -> str:
    """The token as an eye can see it: white space as a sign (`" the"` → `"␣the"`), control characters as `�`, the
    middle of a token longer than `limit` characters as `…`."""
    if len(token) > limit:
        token = token[: limit // 2] + "…" + token[len(token) - (limit - 1) // 2 :]
    return "".join(_SIGNS.get(c, "␣" if c.isspace() else c if c.isprintable() else "�") for c in token)


def font_for(texts: Iterable[str]) -> list[str]:
    """A matplotlib `family` list in which every character of `texts` has a glyph: DejaVu Sans first, then the Chinese
    font of the `look` extra, then installed fonts by name, each only if it adds a character.

    Warns in one sentence where no installed font has a character.
    """
    require("matplotlib")
    missing = {c for text in texts for c in text if c.isprintable() and not c.isspace()}
    families = [FIRST]
    for family in _families():
        if not missing:
            break
        found = {c for c in missing if _has_glyph(family, c)}
        if found and family != FIRST:
            families.append(family)
        missing -= found
    if missing:
        some = "".join(sorted(missing)[:8])
        warnings.warn(
            f"no installed font has a glyph for {some!r} ({len(missing)} characters in all), so they show as boxes: "
            'pip install "qkv[look]" brings Chinese, for another script install one of its Noto fonts',
            stacklevel=2,
        )
    return families


def _families() -> Iterator[str]:
    """Candidates in the order of preference; the machine's own fonts are only looked at when the others fall short."""
    from matplotlib.font_manager import fontManager

    yield FIRST
    yield from _bundled()
    upright = (entry.name for entry in fontManager.ttflist if (entry.style, entry.weight) == ("normal", 400))
    # a last-resort font has every character, each of them as the same box
    yield from sorted({name for name in upright if not name.lstrip(".").startswith("Last")})


@cache
def _bundled() -> tuple[str, ...]:
    """Families of the fonts that the package zhplot carries (Noto Sans SC: both Chinese scripts and kana), registered.

    The package is located and never imported: its import sets matplotlib's global font.
    """
    from matplotlib.font_manager import fontManager, get_font

    spec = find_spec("zhplot")
    if spec is None or spec.origin is None:
        return ()
    files = sorted((Path(spec.origin).parent / "fonts").glob("*.[ot]tf"))
    for file in files:
        fontManager.addfont(file)
    return tuple(dict.fromkeys(get_font(file).family_name for file in files))


@cache
def _has_glyph(family: str, character: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    try:
        font = get_font(findfont(FontProperties(family=[family]), fallback_to_default=False))
    except (OSError, RuntimeError, ValueError):  # a font file that was removed, or that FreeType cannot read
        return False
    return bool(font.scalable and font.get_char_index(ord(character)))
