"""Device memory as an address range."""

from __future__ import annotations

import asyncio

import numpy as np
import psutil
import pytest

from dsml_gpu.errors import AddressOutOfRange, OutOfMemory
from dsml_gpu.memory.arena import MIN_ARENA_BYTES, Arena
from dsml_gpu.memory.backend import NUMPY

MIB = 1 << 20


def test_what_is_written_is_read() -> None:
    async def scenario() -> None:
        arena = Arena(MIN_ARENA_BYTES, NUMPY, min_addr=0x1000)
        await arena.write(0x1003, b"seven b")
        assert bytes(await arena.begin_read(0x1003, 7).wait()) == b"seven b"
        assert bytes(await arena.begin_read(0x1000, 3).wait()) == b"\0\0\0"
        assert arena.view(0x1003, 7).tobytes() == b"seven b"

    asyncio.run(scenario())


def test_a_view_is_the_memory_itself() -> None:
    arena = Arena(MIN_ARENA_BYTES, NUMPY)
    arena.view(8, 8).view(np.float64)[0] = 2.5
    assert arena.view(8, 8).view(np.float64)[0] == 2.5


@pytest.mark.parametrize(
    ("addr", "nbytes"),
    [
        (0xFFF, 1),
        (0x1000 + 4 * MIB, 1),
        (0x1000, 4 * MIB + 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 8, 16),
        (0x1000, (1 << 64) - 1),
        ((1 << 64) - 1, (1 << 64) - 1),
    ],
)
def test_outside_is_refused_with_both_ranges(addr: int, nbytes: int) -> None:
    arena = Arena(4 * MIB, NUMPY, min_addr=0x1000)
    with pytest.raises(
        AddressOutOfRange, match=f"address {addr:#x} \\+ {nbytes} bytes is outside device memory 0x1000..0x401000"
    ):
        arena.view(addr, nbytes)


@pytest.mark.parametrize(("addr", "nbytes"), [(0x1000, 4 * MIB), (0x1000 + 4 * MIB, 0), (0x1000, 0)])
def test_the_ends_are_inside(addr: int, nbytes: int) -> None:
    assert Arena(4 * MIB, NUMPY, min_addr=0x1000).view(addr, nbytes).nbytes == nbytes


def test_too_small_and_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4194304 bytes, not 4194303"):
        Arena(MIN_ARENA_BYTES - 1, NUMPY)
    with pytest.raises(ValueError, match="leave 64 bits"):
        Arena(MIN_ARENA_BYTES, NUMPY, min_addr=(1 << 64) - MIN_ARENA_BYTES)


def test_pages_are_committed_only_when_touched() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    arena = Arena(1 << 34, NUMPY)
    arena.view((1 << 34) - 8, 8)[...] = 1
    assert process.memory_info().rss - before < 16 * MIB


def test_memory_that_cannot_be_had_is_an_error_of_the_access_not_of_the_process() -> None:
    arena = Arena(1 << 62, NUMPY)
    with pytest.raises(OutOfMemory, match=f"device memory of {1 << 62} bytes cannot be had"):
        arena.view(0, 1)
