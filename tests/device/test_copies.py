"""Device memory to the host and back: what is under way at a time, and what is let go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

import numpy as np
import pytest

from dsml_gpu.device.copies import read_pieces, write_chunks
from dsml_gpu.errors import AddressOutOfRange, StreamLength
from dsml_gpu.memory.arena import MIN_ARENA_BYTES, Arena
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.memory.device_memory import Download
from dsml_gpu.wire.codec import Chunk
from tests.support.in_this_process import in_event_loop

START = 0x1000
END = START + MIN_ARENA_BYTES


class Counted:
    """A download of which is known whether it was released."""

    def __init__(self, download: Download) -> None:
        self._download = download
        self.is_released = False

    async def wait(self) -> np.ndarray:
        assert not self.is_released
        return await self._download.wait()

    def release(self) -> None:
        self.is_released = True
        self._download.release()


class CountingArena(Arena):
    """An arena that keeps its downloads."""

    def __init__(self) -> None:
        super().__init__(MIN_ARENA_BYTES, NUMPY, START)
        self.view(START, 4096)[:] = np.arange(4096) % 251
        self.downloads: list[Counted] = []

    def begin_read(self, addr: int, nbytes: int) -> Download:
        self.downloads.append(Counted(super().begin_read(addr, nbytes)))
        return self.downloads[-1]

    @property
    def held(self) -> int:
        return sum(not download.is_released for download in self.downloads)


@pytest.mark.parametrize(("nbytes", "sizes"), [(0, []), (5, [5]), (8, [8]), (20, [8, 8, 4])])
@in_event_loop
async def test_a_range_comes_in_pieces(nbytes: int, sizes: list[int]) -> None:
    arena, came = CountingArena(), []
    async for piece in read_pieces(arena, START + 3, nbytes, 8):
        came.append(bytes(piece))
        assert arena.held <= 2
    assert [len(piece) for piece in came] == sizes
    assert b"".join(came) == bytes(arena.view(START + 3, nbytes))
    assert arena.held == 0


@in_event_loop
async def test_while_one_piece_is_used_the_next_is_under_way() -> None:
    arena = CountingArena()
    async with aclosing(read_pieces(arena, START, 80, 8)) as pieces:
        await anext(pieces)
        assert len(arena.downloads) == 2
        assert arena.held == 2
    assert arena.held == 0, "also of who did not take all"


@in_event_loop
async def test_a_range_outside_the_memory_is_refused() -> None:
    arena = CountingArena()
    with pytest.raises(AddressOutOfRange):
        _ = [piece async for piece in read_pieces(arena, END - 6, 8, 4)]
    assert arena.held == 0


async def chunks(*data: bytes) -> AsyncIterator[Chunk]:
    for one in data:
        yield Chunk(one)


@pytest.mark.parametrize("announced", [0, 7])
@in_event_loop
async def test_chunks_are_written_one_behind_the_other(announced: int) -> None:
    arena = Arena(MIN_ARENA_BYTES, NUMPY, START)
    assert await write_chunks(arena, START + 2, announced, chunks(b"one", b"", b"four")) == 7
    assert bytes(arena.view(START, 11)) == b"\0\0onefour\0\0"


@pytest.mark.parametrize(("announced", "written"), [(5, b"one\0\0\0"), (8, b"onetwo")], ids=["too many", "too few"])
@in_event_loop
async def test_another_number_of_bytes_than_was_announced(announced: int, written: bytes) -> None:
    arena = Arena(MIN_ARENA_BYTES, NUMPY, START)
    with pytest.raises(StreamLength, match=f"{announced} bytes were announced, 6 came"):
        await write_chunks(arena, START, announced, chunks(b"one", b"two"))
    assert bytes(arena.view(START, 6)) == written


@in_event_loop
async def test_what_was_announced_must_fit_before_anything_is_written() -> None:
    arena = Arena(MIN_ARENA_BYTES, NUMPY, START)
    with pytest.raises(AddressOutOfRange):
        await write_chunks(arena, END - 6, 8, chunks(b"one"))
    assert not arena.view(START, 4096).any()
