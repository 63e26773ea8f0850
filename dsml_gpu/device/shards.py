"""A device's part of a checkpoint: ranges of its memory to a file, and back.

The event loop copies memory, piece by piece, and a thread does what files need, so that the server goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from dsml_gpu import failpoints
from dsml_gpu.checkpoints.folders import Folder, folder_at
from dsml_gpu.checkpoints.manifest import SavedFile
from dsml_gpu.checkpoints.shards import ArraySpec, check_header, checked_bytes, header_of, write_shard
from dsml_gpu.checkpoints.threads import in_thread
from dsml_gpu.device.copies import read_pieces
from dsml_gpu.device.device import Device
from dsml_gpu.errors import InvalidValue, OutOfMemory
from dsml_gpu.memory.arena import Arena
from dsml_gpu.reduction import dtype_of
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: What is copied before others get their turn in the event loop.
_COPY_BYTES = 1 << 20


async def save_shard(device: Device, request: pb.SaveShardRequest) -> AsyncGenerator[pb.SaveShardResponse, None]:
    """See SaveShard in the contract. Ending the generator gives the file up."""
    specs = [_spec(array) for array in request.arrays]
    header_of(specs)  # what is wrong with it is to be known before anything is copied
    folder, name = _place(request.url)
    for spec in specs:
        device.arena.check(spec.addr, spec.nbytes)
    copies = [await _copy_to_host(device.arena, spec.addr, spec.nbytes) for spec in specs]
    total = sum(spec.nbytes for spec in specs)
    yield pb.SaveShardResponse(bytesTotal=total)

    loop, moved, stopped = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    written = 0

    def progress(nbytes: int) -> None:
        nonlocal written
        written = nbytes
        failpoints.reach("shard.written", device=device.device_id, nbytes=nbytes)
        loop.call_soon_threadsafe(moved.set)

    def write() -> SavedFile:
        failpoints.reach("shard.begin", device=device.device_id)
        file = write_shard(folder, name, zip(specs, (copy.data for copy in copies), strict=True), progress, stopped.is_set)
        failpoints.reach("shard.end", device=device.device_id)
        return file

    writing = in_thread(write)
    writing.add_done_callback(lambda _: moved.set())
    try:
        while not writing.done():
            await moved.wait()
            moved.clear()
            if not writing.done():
                yield pb.SaveShardResponse(bytesWritten=written, bytesTotal=total)
        yield pb.SaveShardResponse(bytesWritten=total, bytesTotal=total, json=writing.result().to_json())
    finally:
        stopped.set()


async def load_shard(device: Device, request: pb.LoadShardRequest) -> pb.LoadShardResponse:
    """See LoadShard in the contract."""
    wanted = [(array, [_Part(part) for part in array.parts]) for array in request.arrays]
    total = sum(part.nbytes for _, parts in wanted for part in parts)
    if request.checkOnly:
        await in_thread(lambda: _check([part for _, parts in wanted for part in parts]))
        return pb.LoadShardResponse(numBytes=total)
    for array, parts in wanted:
        device.arena.check(array.memAddr, sum(part.nbytes for part in parts))
    loaded = await in_thread(lambda: _load([parts for _, parts in wanted]))
    failpoints.reach("shard.load", device=device.device_id)
    for (array, _), data in zip(wanted, loaded, strict=True):
        for start in range(0, data.nbytes, _COPY_BYTES):
            await device.arena.write(array.memAddr + start, data[start : start + _COPY_BYTES])
            await asyncio.sleep(0)
    await device.arena.memory.finish()
    return pb.LoadShardResponse(numBytes=total)


def _spec(array: pb.ArrayRange) -> ArraySpec:
    dtype_of(array.dtype)  # there is one
    return ArraySpec(array.name, pb.DataType.Name(array.dtype), tuple(array.shape), array.memAddr)


def _place(url: str) -> tuple[Folder, str]:
    """The folder of a file, and the file's name there."""
    folder, _, name = url.rpartition("/")
    if not folder or not name:
        raise InvalidValue(f"url is {url!r}, expected a file in a folder")
    return folder_at(folder), name


async def _copy_to_host(arena: Arena, addr: int, nbytes: int) -> np.ndarray:
    """A copy of device memory that nobody else has."""
    try:
        copy = np.empty(nbytes, np.uint8)
    except MemoryError as error:
        raise OutOfMemory(f"no memory for a copy of {nbytes} bytes: {error}") from error
    copied = 0
    async with aclosing(read_pieces(arena, addr, nbytes, _COPY_BYTES)) as pieces:
        async for piece in pieces:
            copy[copied : copied + piece.nbytes] = piece
            copied += piece.nbytes
            await asyncio.sleep(0)
    return copy


class _Part:
    """Bytes of an array of a file."""

    def __init__(self, wire: pb.LoadedPart) -> None:
        self.url: str = wire.url
        self.file = SavedFile.of_json(wire.json)
        self.array = self.file.array(wire.name)
        self.start: int = wire.start
        self.nbytes: int = wire.numBytes
        self.folder, name = _place(wire.url)
        if name != self.file.name:
            raise InvalidValue(f"{wire.url} is described as {self.file.name}")
        if self.start + self.nbytes > self.array.nbytes:
            raise InvalidValue(
                f"bytes {self.start}..{self.start + self.nbytes} of {wire.name} of {wire.url}, which has {self.array.nbytes}"
            )


def _check(parts: Sequence[_Part]) -> None:
    _check_headers(parts)
    for part in parts:
        for _ in checked_bytes(part.folder, part.file, part.array, part.start, part.nbytes):
            pass


def _load(arrays: Sequence[Sequence[_Part]]) -> list[np.ndarray]:
    """All arrays, in host memory."""
    _check_headers([part for parts in arrays for part in parts])
    loaded: list[np.ndarray[Any, Any]] = []
    for parts in arrays:
        nbytes = sum(part.nbytes for part in parts)
        try:
            data = np.empty(nbytes, np.uint8)
        except MemoryError as error:
            raise OutOfMemory(f"no memory for {nbytes} bytes of a checkpoint: {error}") from error
        filled = 0
        for part in parts:
            for piece in checked_bytes(part.folder, part.file, part.array, part.start, part.nbytes):
                data[filled : filled + piece.nbytes] = np.frombuffer(piece, np.uint8)
                filled += piece.nbytes
        loaded.append(data)
    return loaded


def _check_headers(parts: Sequence[_Part]) -> None:
    for part in {part.url: part for part in parts}.values():
        check_header(part.folder, part.file)
