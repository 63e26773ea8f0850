"""Device memory to and from clients, each copy in its turn among the operations on the device (`order`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial

from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.errors import OperationTimeout
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.chunk_streams import of_length
from dsml_gpu.wire.codec import Chunk

#: A copy by a client itself may take the stall timeout and what it needs at this speed, far below that of any memory.
_SLOWEST_COPY_BYTES_PER_S = 100e6


class Copies:
    """All copies of a coordinator. Each method takes its place in the device's order when it begins.

    Besides what they say, all raise AddressOutOfRange for a range that leaves the device's memory, PeerUnavailable where the
    device is lost, and OperationTimeout where earlier work on it does not end.

    Args:
        stall_timeout_s: see `CoordinatorSettings`.
        operation_timeout_s: how long to wait for earlier work.
    """

    def __init__(self, stall_timeout_s: float, operation_timeout_s: float) -> None:
        self._stall_timeout_s = stall_timeout_s
        self._operation_timeout_s = operation_timeout_s

    async def write(self, handle: DeviceHandle, addr: int, nbytes: int, chunks: AsyncIterator[Chunk]) -> int:
        """Writes chunks one behind the other; returns how many bytes they were.

        Args:
            nbytes: that are announced; 0: nobody said.

        Raises:
            StreamLength: more or fewer come. What came before may be written.
        """
        handle.check(addr, nbytes)
        async with self._turn(handle):
            handle.require_alive()
            return await handle.write(addr, nbytes, of_length(chunks, nbytes, partial(handle.check, addr)))

    async def read(self, handle: DeviceHandle, addr: int, nbytes: int) -> AsyncGenerator[Chunk, None]:
        """The bytes of a range. To be closed (`contextlib.aclosing`) by those who do not take all."""
        handle.check(addr, nbytes)
        async with self._turn(handle):
            handle.require_alive()
            async with aclosing(handle.read(addr, nbytes)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def read_all(self, handle: DeviceHandle, addr: int, nbytes: int) -> bytes:
        """The bytes of a range, in one piece."""
        data = bytearray(nbytes)
        filled = 0
        async for chunk in self.read(handle, addr, nbytes):
            piece = memoryview(chunk.data)
            data[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
        return bytes(data)

    async def hold(
        self, handle: DeviceHandle, addr: int, nbytes: int, writes: bool
    ) -> AsyncGenerator[pb.SharedMemory, None]:
        """Says where a device's memory can be opened, and keeps other work away from it until this is closed.

        Args:
            addr, nbytes: what the caller copies by itself.
            writes: it is going to write there. When it takes too long the memory moves to where it has not opened it.

        Raises:
            OperationTimeout: the caller has not closed it in time.
            MemoryNotShared: the device does not share its memory.
        """
        handle.check(addr, nbytes)
        limit_s = self._stall_timeout_s + nbytes / _SLOWEST_COPY_BYTES_PER_S
        async with self._turn(handle):
            handle.require_alive()
            await handle.share_memory()
            assert handle.shared is not None
            yield handle.shared
            await asyncio.sleep(limit_s)  # the caller ends it
            if writes:
                await handle.share_memory(move=True)
            raise OperationTimeout(f"the caller has held the memory of {handle} for {limit_s:g} s")

    def _turn(self, handle: DeviceHandle) -> Turn:
        return Turn([handle], self._operation_timeout_s)
