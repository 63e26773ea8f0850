"""Sizes, durations and bandwidths as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
#: Exactly as written: b is a bit, B a byte. Rates count in thousands, but for Ki, Mi, ...
_PREFIXES = {"": 1, "k": 1000} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("i", 1024))
}
_BYTES = {"bit/s": 1 / 8, "b/s": 1 / 8, "bps": 1 / 8, "B/s": 1.0, "Bps": 1.0}
_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"


def parse_size(text: str) -> int:
    """Bytes of ``"1GiB"``, ``"512 MiB"``, ``"64K"`` (1024s), ``"16MB"`` (1000s) or ``"4096"``.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(rf"{_NUMBER}([A-Za-z]*)\s*", str(text))
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


def parse_duration(text: str) -> float:
    """Seconds of ``"250ns"``, ``"100us"``, ``"1.5 ms"`` or ``"2s"``.

    Raises:
        ValueError: it is no duration.
    """
    match = re.fullmatch(rf"{_NUMBER}([a-zµ]+)\s*", str(text))
    if match is None or match[2] not in _SECONDS:
        raise ValueError(f"{text!r} is not a duration such as 250ns, 100us, 1.5ms or 2s")
    return float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """``"2 s"``, ``"1.5 ms"``, ``"100 us"``, ``"0 s"``."""
    for unit in ("s", "ms", "us"):
        if round(seconds, 9) >= _SECONDS[unit]:
            return f"{seconds / _SECONDS[unit]:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns" if seconds else "0 s"


def parse_bandwidth(text: str) -> float:
    """Bytes a second of ``"1Gbit/s"``, ``"10 Gbps"``, ``"125MB/s"`` (1000s) or ``"1GiB/s"`` (1024s).

    Raises:
        ValueError: it is no bandwidth.
    """
    match = re.fullmatch(rf"{_NUMBER}([KMGT]i|[kKMGT]?)({'|'.join(_BYTES)})\s*", str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a bandwidth such as 1Gbit/s, 10Gbps or 125MB/s")
    bytes_per_s: float = float(match[1]) * _PREFIXES[match[2]] * _BYTES[match[3]]
    return bytes_per_s


def format_bandwidth(bytes_per_s: float) -> str:
    """``"1 Gbit/s"``, ``"2.5 Mbit/s"``, ``"80 bit/s"``: networks count in bits."""
    bits_per_s = bytes_per_s * 8
    for prefix in ("T", "G", "M", "K"):
        if bits_per_s >= _PREFIXES[prefix]:
            return f"{bits_per_s / _PREFIXES[prefix]:.4g} {prefix.replace('K', 'k')}bit/s"
    return f"{bits_per_s:.4g} bit/s"
