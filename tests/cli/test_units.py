"""Sizes as people write them."""

from __future__ import annotations

import pytest

from dsml_gpu.cli.units import format_size, parse_size


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
