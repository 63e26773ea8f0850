"""Device memory to and from the host, piece by piece."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator

import numpy as np

from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.device_memory import Download
from dsml_gpu.wire.chunk_streams import of_length
from dsml_gpu.wire.codec import Chunk


async def read_pieces(arena: Arena, addr: int, nbytes: int, piece_bytes: int) -> AsyncGenerator[np.ndarray, None]:
    """Copies a range to the host.

    To be closed (`contextlib.aclosing`) by those who do not take all.

    Args:
        addr, nbytes: the range, of which nothing may change before it is there.

    Yields:
        Its bytes, in pieces of `piece_bytes` and a last one of what is left. Each is valid until the next is asked for.

    Raises:
        AddressOutOfRange: it leaves the device's memory.
    """
    starts = iter(range(addr, addr + nbytes, piece_bytes))
    under_way: deque[Download] = deque()
    try:
        while True:
            # While one piece is used, the next one comes to the host.
            for start in itertools.islice(starts, 2 - len(under_way)):
                under_way.append(arena.begin_read(start, min(piece_bytes, addr + nbytes - start)))
            if not under_way:
                return
            yield await under_way[0].wait()
            under_way.popleft().release()
    finally:
        for download in under_way:
            download.release()


async def write_chunks(arena: Arena, addr: int, announced: int, chunks: AsyncIterator[Chunk]) -> int:
    """Writes the data of chunks to device memory, one behind the other; returns how many bytes, when they are there.

    Args:
        announced: bytes that are to come; 0: nobody said.

    Raises:
        StreamLength: more or fewer come. What came before is written.
        AddressOutOfRange: they leave the device's memory.
    """
    arena.check(addr, announced)
    written = 0
    async for chunk in of_length(chunks, announced):
        data = memoryview(chunk.data)
        await arena.write(addr + written, data)
        written += data.nbytes
    await arena.memory.finish()
    return written
