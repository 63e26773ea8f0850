"""Streams of chunks to device memory: what they begin with, and how long they are."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from dsml_gpu.errors import AddressOutOfRange, MissingField, StreamLength
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.chunk_streams import of_length, with_header
from dsml_gpu.wire.codec import Chunk
from tests.support.in_this_process import in_event_loop


async def stream(*chunks: Chunk) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def take(chunks: AsyncIterator[Chunk], taken: list[bytes]) -> None:
    async for chunk in chunks:
        taken.append(chunk.data)


@in_event_loop
async def test_the_header_comes_apart_from_all_of_the_data() -> None:
    header = pb.DataChunk(numBytes=6)
    first, chunks = await with_header(stream(Chunk(b"one", header), Chunk(b"two")))
    assert first == header
    assert [chunk async for chunk in chunks] == [Chunk(b"one"), Chunk(b"two")]


@pytest.mark.parametrize("chunks", [(), (Chunk(b"one"), Chunk(b"two", pb.DataChunk(numBytes=6)))], ids=["none", "late"])
@in_event_loop
async def test_the_header_must_be_that_of_the_first(chunks: tuple[Chunk, ...]) -> None:
    with pytest.raises(MissingField, match="the first chunk of StreamHostToDevice must carry deviceId and memAddr"):
        await with_header(stream(*chunks))


@pytest.mark.parametrize("announced", [0, 6])
@in_event_loop
async def test_as_many_bytes_as_announced_come_through(announced: int) -> None:
    ends: list[int] = []
    chunks = stream(Chunk(b"one"), Chunk(b""), Chunk(b"two"))
    assert [chunk.data async for chunk in of_length(chunks, announced, ends.append)] == [b"one", b"", b"two"]
    assert ends == [3, 3, 6]


@pytest.mark.parametrize(("announced", "came"), [(5, [b"one"]), (7, [b"one", b"two"])], ids=["too many", "too few"])
@in_event_loop
async def test_another_number_of_bytes_is_refused_with_the_chunk_that_shows_it(announced: int, came: list[bytes]) -> None:
    taken: list[bytes] = []
    with pytest.raises(StreamLength, match=f"{announced} bytes were announced, 6 came"):
        await take(of_length(stream(Chunk(b"one"), Chunk(b"two")), announced), taken)
    assert taken == came


@in_event_loop
async def test_what_does_not_fit_is_refused_before_it_is_passed_on() -> None:
    def fits_four(end: int) -> None:
        if end > 4:
            raise AddressOutOfRange(f"{end} bytes")

    taken: list[bytes] = []
    with pytest.raises(AddressOutOfRange, match="6 bytes"):
        await take(of_length(stream(Chunk(b"one"), Chunk(b"two")), 0, fits_four), taken)
    assert taken == [b"one"]
