"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}


def parse_size(text: str) -> int:
    """Bytes of ``"1GiB"``, ``"512 MiB"``, ``"64K"`` (1024s), ``"16MB"`` (1000s) or ``"4096"``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not a size such as 4096, 512MiB or 1GiB")
    return int(float(match[1]) * units[match[2].lower()]) if "." in match[1] else int(match[1]) * units[match[2].lower()]


def format_size(nbytes: int) -> str:
    """``"1 GiB"``, ``"1.5 MiB"``, ``"17 B"``."""
    for power, prefix in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.4g} {prefix}iB"
    return f"{nbytes} B"
