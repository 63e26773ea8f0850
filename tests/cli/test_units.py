"""Sizes, durations and bandwidths as people write them."""

from __future__ import annotations

import pytest

from dsml_gpu.cli.units import (
    format_bandwidth,
    format_duration,
    format_size,
    parse_bandwidth,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("17B", 17),
        ("1K", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("64M", 64 * 1024**2),
        ("512 MiB", 512 * 1024**2),
        ("16MB", 16_000_000),
        ("1GiB", 1024**3),
        ("2TB", 2 * 10**12),
        ("1.5KiB", 1536),
        ("3.6MB", 3_600_000),
        ("  8 kb ", 8000),
        ("1gib", 1024**3),
    ],
)
def test_parse_size(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_parse_size_is_exact_where_a_float_would_not_be() -> None:
    assert parse_size("9007199254740993") == 2**53 + 1


@pytest.mark.parametrize("text", ["", "B", "1XB", "-1", "1e3", "1,5K", "0x10", "1 2", "1KiBB", "inf", ".5K"])
def test_parse_size_refuses_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size such as"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * 1024**2, "512 MiB"),
        (1024**3, "1 GiB"),
        (5 * 1024**4 // 2, "2.5 TiB"),
    ],
)
def test_format_size(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize("nbytes", [1, 999, 1024, 3 * 1024**2, 7 * 1024**3])
def test_what_is_formatted_can_be_parsed(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0),
        ("250ns", 250e-9),
        ("100us", 100e-6),
        ("100µs", 100e-6),
        ("1.5ms", 1.5e-3),
        ("2s", 2),
        (" 10 ms ", 10e-3),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "5", "us", "-1s", "1e3s", "1,5s", "1m", "1 2s", "1S", "1ms2us", ".5s", "inf s"])
def test_parse_duration_refuses_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration such as"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (250e-9, "250 ns"),
        (1e-6, "1 us"),
        (100e-6, "100 us"),
        (1e-3, "1 ms"),
        (1.5e-3, "1.5 ms"),
        (2, "2 s"),
        (90, "90 s"),
    ],
)
def test_format_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("8bit/s", 1),
        ("1Gbit/s", 125e6),
        ("10Gbps", 1.25e9),
        ("100 Mb/s", 12.5e6),
        ("125MB/s", 125e6),
        ("125MBps", 125e6),
        ("2.5Gbit/s", 312.5e6),
        ("64kbit/s", 8000),
        ("64Kbit/s", 8000),
        ("1GiB/s", 1024**3),
        ("1Mibit/s", 1024**2 / 8),
        ("1Tbit/s", 125e9),
        ("10B/s", 10),
        (" 1 Gbit/s ", 125e6),
    ],
)
def test_parse_bandwidth(text: str, bytes_per_s: float) -> None:
    assert parse_bandwidth(text) == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    "text", ["", "0", "100", "1G", "1GB", "1gbit/s", "1Gbit", "1mbit/s", "-1Gbit/s", "1kiB/s", "1e9bit/s", "1,5Gbps", "Gbps"]
)
def test_parse_bandwidth_refuses_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match="is not a bandwidth such as"):
        parse_bandwidth(text)


@pytest.mark.parametrize(
    ("bytes_per_s", "text"),
    [
        (1, "8 bit/s"),
        (8000, "64 kbit/s"),
        (12.5e6, "100 Mbit/s"),
        (125e6, "1 Gbit/s"),
        (312.5e6, "2.5 Gbit/s"),
        (125e9, "1 Tbit/s"),
    ],
)
def test_format_bandwidth(bytes_per_s: float, text: str) -> None:
    assert format_bandwidth(bytes_per_s) == text
    assert parse_bandwidth(text) == pytest.approx(bytes_per_s)
