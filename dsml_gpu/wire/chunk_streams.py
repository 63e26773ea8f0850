"""Streams of chunks that go to device memory, of which the first says where to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from dsml_gpu.errors import MissingField, StreamLength
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk


async def with_header(chunks: AsyncIterator[Chunk]) -> tuple[pb.DataChunk, AsyncIterator[Chunk]]:
    """The header of the first chunk, and all chunks without it. Raises MissingField where there is none."""
    first = await anext(chunks, None)
    if first is None or first.header is None:
        raise MissingField("the first chunk of StreamHostToDevice must carry deviceId and memAddr")
    data = first.data

    async def without_header() -> AsyncIterator[Chunk]:
        yield Chunk(data)
        async for chunk in chunks:
            yield chunk

    return first.header, without_header()


async def of_length(
    chunks: AsyncIterator[Chunk], announced: int, check: Callable[[int], None] | None = None
) -> AsyncIterator[Chunk]:
    """The chunks, as long as they are as many bytes as announced.

    Args:
        announced: 0: nobody said.
        check: called before each with the number of bytes up to its end; what it raises comes instead of the chunk.

    Raises:
        StreamLength: in place of the chunk with which there are too many, or at the end, where there are too few.
    """
    total = 0
    async for chunk in chunks:
        total += memoryview(chunk.data).nbytes
        if announced and total > announced:
            raise StreamLength(f"{announced} bytes were announced, {total} came")
        if check is not None:
            check(total)
        yield chunk
    if announced and total != announced:
        raise StreamLength(f"{announced} bytes were announced, {total} came")
