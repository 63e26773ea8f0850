"""Colours by what they mean, on white and on dark paper.

Nobody needs to see hues: partial results differ in lightness, complete ones are darker (on dark paper lighter) than all of
them, and owners have the colours of viridis, which get ever lighter. Blue and orange, for partial and complete results, are
told apart with all usual colour deficiencies.
"""

from __future__ import annotations

from dataclasses import dataclass

Rgb = tuple[float, float, float]

#: Viridis in 5 stops, without its ends, which are almost black and glaring.
_VIRIDIS = ("#46327e", "#365c8d", "#1f988b", "#5ec962", "#dde318")


@dataclass(frozen=True, slots=True)
class Palette:
    """One colour for each meaning, as ``#rrggbb``.

    Attributes:
        paper: behind everything; band: behind the columns of ranks; host: behind the names of hosts.
        ink, muted: of texts; hairline: around cells.
        least, most: of partial results with one contribution, and with all but one.
        complete: of complete results.
        reduce, copy: of arrows.
    """

    paper: str
    band: str
    host: str
    ink: str
    muted: str
    hairline: str
    least: str
    most: str
    complete: str
    reduce: str
    copy: str

    def colour(self, name: str) -> str:
        """The colour of a name: one of the attributes, or of `partial`, `owner` and `on`."""
        kind, _, rest = name.partition(":")
        if kind == "partial":
            return _blend((self.least, self.most), int(rest) / 100)
        if kind == "owner":
            return _blend(_VIRIDIS, int(rest) / 100)
        if kind == "on":
            return "#000000" if luminance(self.colour(rest)) > 0.18 else "#ffffff"
        return str(getattr(self, name))


LIGHT = Palette(
    paper="#ffffff",
    band="#f4f6f8",
    host="#e1e6eb",
    ink="#1b1f24",
    muted="#57606a",
    hairline="#9aa4af",
    least="#e3effa",
    most="#2f80bb",
    complete="#c24d00",
    reduce="#0072b2",
    copy="#b04600",
)
DARK = Palette(
    paper="#14171c",
    band="#1c2026",
    host="#2b313a",
    ink="#e8eaed",
    muted="#a3acb6",
    hairline="#5b6570",
    least="#173350",
    most="#4f9fdb",
    complete="#ffa95c",
    reduce="#6db6ee",
    copy="#ffa95c",
)


def partial(fraction: float) -> str:
    """The name of a partial result's colour: 0 with one contribution, 1 with all but one."""
    return f"partial:{100 * fraction**0.7:.0f}"  # the first contributions are the hardest to see


def owner(fraction: float) -> str:
    """The name of the colour of what belongs to a rank: 0 for the first, 1 for the last."""
    return f"owner:{fraction * 100:.0f}"


def on(name: str) -> str:
    """The name of the colour for text on another colour."""
    return f"on:{name}"


def luminance(colour: str) -> float:
    """Relative luminance as WCAG defines it: 0 of black, 1 of white."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in _rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _rgb(colour: str) -> Rgb:
    red, green, blue = (int(colour[first : first + 2], 16) / 255 for first in (1, 3, 5))
    return red, green, blue


def _blend(stops: tuple[str, ...], fraction: float) -> str:
    """The colour at a fraction of the way through the stops."""
    place = fraction * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    share = place - first
    before, after = _rgb(stops[first]), _rgb(stops[first + 1])
    return "#" + "".join(f"{round(255 * (a + (b - a) * share)):02x}" for a, b in zip(before, after, strict=True))
