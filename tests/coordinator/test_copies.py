"""Copies of clients take turns on a device, also one that the client makes by itself; without devices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import pytest

from dsml_gpu.coordinator.copies import Copies
from dsml_gpu.coordinator.device_handle import DeviceHandle, pieces
from dsml_gpu.errors import AddressOutOfRange, OperationTimeout, StreamLength
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from tests.support.in_this_process import in_event_loop

MEMORY_BYTES = 16


class FakeDevice:
    """A device with memory at 0..15.

    Attributes:
        shares: of each time that it said where its memory is, whether it was to move before.
    """

    def __init__(self) -> None:
        self.last_work = None
        self.memory = bytearray(MEMORY_BYTES)
        self.shared: pb.SharedMemory | None = None
        self.shares: list[bool] = []

    def check(self, addr: int, nbytes: int) -> None:
        if addr + nbytes > MEMORY_BYTES:
            raise AddressOutOfRange(f"{addr + nbytes} is behind the end")

    def require_alive(self) -> None:
        pass

    async def share_memory(self, move: bool = False) -> None:
        self.shares.append(move)
        self.shared = pb.SharedMemory(numBytes=MEMORY_BYTES, offset=len(self.shares))

    async def write(self, addr: int, nbytes: int, chunks: AsyncIterator[Chunk]) -> int:
        end = addr
        async for chunk in chunks:
            self.memory[end : end + len(chunk.data)] = chunk.data
            end += len(chunk.data)
        return end - addr

    async def read(self, addr: int, nbytes: int) -> AsyncGenerator[Chunk, None]:
        for start in range(addr, addr + nbytes, 4):
            yield Chunk(bytes(self.memory[start : min(start + 4, addr + nbytes)]))


def fake() -> tuple[FakeDevice, DeviceHandle]:
    device = FakeDevice()
    return device, cast("DeviceHandle", device)


@in_event_loop
async def test_what_is_written_is_read() -> None:
    (device, handle), copies = fake(), Copies(60, 60)
    assert await copies.write(handle, 3, 6, pieces(b"abcdef")) == 6
    assert await copies.read_all(handle, 2, 8) == b"\0abcdef\0"
    assert bytes(device.memory) == b"\0\0\0abcdef" + bytes(7)


@pytest.mark.parametrize(
    ("announced", "error"), [(0, AddressOutOfRange), (5, StreamLength)], ids=["outside the memory", "more than announced"]
)
@in_event_loop
async def test_the_device_gets_nothing_that_is_too_much(announced: int, error: type[Exception]) -> None:
    async def chunks() -> AsyncIterator[Chunk]:
        yield Chunk(b"one")
        yield Chunk(b"two")

    (device, handle), copies = fake(), Copies(60, 60)
    with pytest.raises(error):
        await copies.write(handle, 11, announced, chunks())
    assert bytes(device.memory) == bytes(11) + b"one\0\0"


@in_event_loop
async def test_nobody_copies_while_a_client_holds_the_memory() -> None:
    (device, handle), copies = fake(), Copies(60, 0.01)
    async with aclosing(copies.hold(handle, 0, 4, writes=True)) as places:
        assert await anext(places) == device.shared
        with pytest.raises(OperationTimeout, match="earlier work on the devices did not end"):
            await copies.read_all(handle, 0, 4)
    assert await copies.read_all(handle, 0, 4) == bytes(4)
    assert device.shares == [False], "its memory stays where it is for a client that lets go in time"


@pytest.mark.parametrize("writes", [False, True])
@in_event_loop
async def test_a_client_that_holds_memory_too_long_can_write_to_it_no_more(writes: bool) -> None:
    (device, handle), copies = fake(), Copies(0.01, 60)
    places: Any = copies.hold(handle, 0, 4, writes)
    await anext(places)
    with pytest.raises(OperationTimeout, match="has held the memory"):
        await anext(places)
    assert device.shares == ([False, True] if writes else [False])
    assert await copies.read_all(handle, 0, 4) == bytes(4)
