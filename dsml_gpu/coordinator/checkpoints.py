"""Checkpoints of communicators: the devices write and read the files, side by side; the coordinator has them do it.

A checkpoint has its place in the order of its devices' work until all of them have copied what is to be written. The files
are written while later operations run, and the manifest, which makes them a checkpoint, when all of them are whole. Under
one URL checkpoints become complete in the order in which they were issued. One coordinator at a time writes under a URL.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

from dsml_gpu import failpoints
from dsml_gpu.checkpoints.folders import Folder, check_url, folder_at
from dsml_gpu.checkpoints.manifest import (
    Manifest,
    SavedFile,
    damaged,
    new_generation,
    read_manifest,
    remove_older,
    shard_name,
    write_manifest,
)
from dsml_gpu.checkpoints.resharding import Source, shapes_on, sources_of
from dsml_gpu.checkpoints.shards import ArraySpec, header_of
from dsml_gpu.checkpoints.threads import in_thread
from dsml_gpu.coordinator.control_round import all_or_first_error, cancel
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.epochs import Epoch
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.errors import CheckpointDamaged, CheckpointNotFound, InvalidValue, RankMismatch, StorageUnavailable
from dsml_gpu.reduction import dtype_of
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: A file of which nothing was written for so long will not be.
_STORAGE_STALL_TIMEOUT_S = 120.0
#: To read files may take this and the time that they need at that speed, far below that of any store.
_STORAGE_TIMEOUT_S, _SLOWEST_STORAGE_BYTES_PER_S = 60.0, 4e6


class Ranks(Protocol):
    """What is asked of a communicator."""

    comm_id: int

    @property
    def handles(self) -> Sequence[DeviceHandle]:
        """Rank r is ``handles[r]``."""

    @property
    def epoch(self) -> Epoch:
        """The present one."""


@dataclass(frozen=True, slots=True)
class LastCheckpoint:
    """The last complete checkpoint of a communicator: where it is, and the seat of each of its ranks (`epochs`)."""

    url: str
    seats: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedRange:
    """Where in a device's memory an array was."""

    name: str
    addr: int
    nbytes: int


class Checkpoints:
    """All checkpoints of a coordinator.

    Args:
        operation_timeout_s: how long to wait for earlier work on the devices.
    """

    def __init__(self, operation_timeout_s: float) -> None:
        self._operation_timeout_s = operation_timeout_s
        #: By URL: the generations that are being written, and the end of the one that was issued last.
        self._generations: dict[str, set[str]] = {}
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._last: dict[int, LastCheckpoint] = {}

    def last(self, comm_id: int) -> LastCheckpoint | None:
        """The last complete checkpoint of a communicator; None: it has none."""
        return self._last.get(comm_id)

    def set_last(self, comm_id: int, last: LastCheckpoint) -> None:
        """A coordinator that was restarted remembers it."""
        self._last[comm_id] = last

    def forget(self, comm_id: int) -> None:
        """The communicator has ended; its checkpoints stay. Idempotent."""
        self._last.pop(comm_id, None)

    # ---- writing ------------------------------------------------------------------------------------------------------

    async def save(self, comm: Ranks, request: pb.CheckpointRequest) -> AsyncGenerator[pb.CheckpointProgress, None]:
        """See Checkpoint in the contract. Ending the generator gives the checkpoint up.

        Its place in the order is taken when the first answer is asked for.
        """
        handles, seats = tuple(comm.handles), comm.epoch.seats
        url = _checked_url(request.url)
        requests = save_requests(request, handles, generation := new_generation())
        total = sum(_nbytes(array) for one in requests for array in one.arrays)
        turn = Turn(handles, self._operation_timeout_s)
        loop = asyncio.get_running_loop()
        earlier, ended = self._ends.get(url), loop.create_future()
        self._ends[url] = ended
        generations = self._generations.setdefault(url, set())
        generations.add(generation)
        try:
            async with AsyncExitStack() as stack:
                async with turn:
                    saves = [_Save(handle, one) for handle, one in zip(handles, requests, strict=True)]
                    for save in saves:
                        stack.push_async_callback(save.close)
                    await all_or_first_error([save.copied() for save in saves])
                yield pb.CheckpointProgress(bytesTotal=total, copied=True)
                async for written in _progress(saves):
                    yield pb.CheckpointProgress(bytesWritten=written, bytesTotal=total, copied=True)
                files = tuple(save.file() for save in saves)
            if earlier is not None:
                await asyncio.wait([earlier])
            await in_thread(lambda: _complete(url, Manifest(generation, files), generations))
            self._last[comm.comm_id] = LastCheckpoint(url, seats)
            yield pb.CheckpointProgress(bytesWritten=total, bytesTotal=total, copied=True, complete=True)
        finally:
            turn.end()
            generations.discard(generation)
            if not generations:
                del self._generations[url]
            # One that was given up ends with those before it, so that nothing overtakes.
            if earlier is None or earlier.done():
                self._end(url, ended)
            else:
                earlier.add_done_callback(lambda _: self._end(url, ended))

    def _end(self, url: str, ended: asyncio.Future[None]) -> None:
        ended.set_result(None)
        if self._ends.get(url) is ended:
            del self._ends[url]

    # ---- reading ------------------------------------------------------------------------------------------------------

    async def restore(self, comm: Ranks, request: pb.RestoreRequest) -> pb.RestoreResponse:
        """See Restore in the contract."""
        handles = tuple(comm.handles)
        url = _checked_url(request.url)
        if request.describeOnly:
            manifest = await in_thread(lambda: read_manifest(folder_at(url)))
            return pb.RestoreResponse(arrays=described(manifest, len(handles)))
        if not request.arrays:
            raise InvalidValue("arrays is empty, expected at least one that is to be restored")
        check_arrays(request.arrays, handles)
        async with Turn(handles, self._operation_timeout_s):
            manifest = await in_thread(lambda: read_manifest(folder_at(url)))
            while True:
                loads = load_requests(manifest, url, request.arrays, handles)
                try:
                    await _load_all(handles, check_requests(manifest, url, handles))
                    failpoints.reach("restore.checked", comm=comm.comm_id)
                    return pb.RestoreResponse(numBytes=sum(await _load_all(handles, loads)))
                except CheckpointNotFound as error:
                    told, manifest = manifest, await in_thread(lambda: read_manifest(folder_at(url)))
                    if manifest.generation == told.generation:
                        raise CheckpointDamaged(f"{error}, of which the manifest tells") from None
                    # Another checkpoint has taken its place meanwhile.


async def restore_rank(url: str, handle: DeviceHandle, rank: int) -> int:
    """Loads all arrays of one rank of a complete checkpoint into a device, at the addresses that they had on the rank's own.

    The caller sees to it that nothing else uses the memory. Nothing is changed where it fails with one of the first four.

    Returns:
        Bytes.

    Raises:
        CheckpointNotFound: there is no complete checkpoint.
        CheckpointDamaged: the manifest or the rank's file is not what was written.
        InvalidValue: the checkpoint has no such rank.
        AddressOutOfRange: the device's memory does not have the addresses.
        PeerUnavailable, OperationTimeout: the device does not do it.
    """
    file = await _file_of(url, rank)
    array_parts = [(saved.addr, [Source(rank, saved.name, 0, saved.nbytes)]) for saved in file.arrays]
    request = pb.LoadShardRequest(
        deviceId=handle.device_id,
        arrays=[
            pb.LoadedArray(memAddr=addr, parts=[_part(url, file, source) for source in sources])
            for addr, sources in array_parts
        ],
    )
    (nbytes,) = await _load_all([handle], [request])
    return nbytes


async def saved_ranges(url: str, rank: int) -> list[SavedRange]:
    """The address ranges that a complete checkpoint holds of a rank. Raises as `restore_rank`."""
    return [SavedRange(array.name, array.addr, array.nbytes) for array in (await _file_of(url, rank)).arrays]


def check_arrays(arrays: Sequence[pb.CheckpointArray], handles: Sequence[DeviceHandle]) -> None:
    """Raises unless arrays have unique names, known types, and one part for each rank, in its device's memory.

    Raises:
        InvalidValue, RankMismatch, AddressOutOfRange: which of it is not so.
    """
    seen = set()
    for array in arrays:
        dtype = dtype_of(array.dtype)
        if array.name in seen:
            raise InvalidValue(f"two arrays are called {array.name!r}")
        seen.add(array.name)
        if len(array.parts) != len(handles):
            raise RankMismatch(f"{len(handles)} ranks need one part of {array.name!r} each, got {len(array.parts)}")
        for handle, part in zip(handles, array.parts, strict=True):
            handle.check(part.memAddr, math.prod(part.shape) * dtype.itemsize)


def save_requests(
    request: pb.CheckpointRequest, handles: Sequence[DeviceHandle], generation: str
) -> list[pb.SaveShardRequest]:
    """What each rank is to write. Raises as `check_arrays`."""
    if not request.arrays:
        raise InvalidValue("arrays is empty, expected at least one that is to be written")
    check_arrays(request.arrays, handles)
    header_of([ArraySpec(array.name, pb.DataType.Name(array.dtype), (0,), 0) for array in request.arrays])
    url = _checked_url(request.url)
    return [
        pb.SaveShardRequest(
            deviceId=handle.device_id,
            url=f"{url}/{shard_name(generation, rank, len(handles))}",
            arrays=[
                pb.ArrayRange(
                    name=array.name,
                    dtype=array.dtype,
                    shape=array.parts[rank].shape,
                    memAddr=array.parts[rank].memAddr,
                )
                for array in request.arrays
            ],
        )
        for rank, handle in enumerate(handles)
    ]


def load_requests(
    manifest: Manifest, url: str, arrays: Sequence[pb.CheckpointArray], handles: Sequence[DeviceHandle]
) -> list[pb.LoadShardRequest]:
    """What each rank is to read. Raises InvalidValue where types or shapes are not those of the checkpoint."""
    requests = [pb.LoadShardRequest(deviceId=handle.device_id) for handle in handles]
    for array in arrays:
        shapes = [tuple(part.shape) for part in array.parts]
        cuts = sources_of(manifest, array.name, pb.DataType.Name(array.dtype), shapes)
        for part, sources, request in zip(array.parts, cuts, requests, strict=True):
            request.arrays.add(
                memAddr=part.memAddr,
                parts=[_part(url, manifest.files[source.rank], source) for source in sources],
            )
    return requests


def check_requests(manifest: Manifest, url: str, handles: Sequence[DeviceHandle]) -> list[pb.LoadShardRequest]:
    """All files, spread over the devices, to be checked."""
    requests = [pb.LoadShardRequest(deviceId=handle.device_id, checkOnly=True) for handle in handles]
    for rank, file in enumerate(manifest.files):
        for array in file.arrays:
            part = _part(url, file, Source(rank, array.name, 0, array.nbytes))
            requests[rank % len(handles)].arrays.add(parts=[part])
    return requests


def described(manifest: Manifest, nranks: int) -> list[pb.CheckpointArray]:
    """The arrays of a checkpoint, as so many ranks have them. Raises InvalidValue where one cannot be cut for them."""
    return [
        pb.CheckpointArray(
            name=name,
            dtype=manifest.parts(name)[0].dtype,
            parts=[pb.ArrayPart(shape=shape) for shape in shapes_on(manifest, name, nranks)],
        )
        for name in manifest.names
    ]


class _Save:
    """A rank's SaveShard."""

    def __init__(self, handle: DeviceHandle, request: pb.SaveShardRequest) -> None:
        self._handle = handle
        self._url = request.url
        self._answers = handle.stream("SaveShard", request, _STORAGE_STALL_TIMEOUT_S)
        self.written = 0
        self._json = ""

    async def copied(self) -> None:
        """Returns when the device has copied what is to be written."""
        await self._next()

    async def finish(self, moved: asyncio.Event) -> None:
        """Returns when the file is whole; `moved` is set whenever there is more of it."""
        while await self._next():
            moved.set()

    async def _next(self) -> bool:
        answer = await anext(self._answers, None)
        if answer is None:
            return False
        self.written, self._json = answer.bytesWritten, answer.json
        return True

    def file(self) -> SavedFile:
        if not self._json:
            raise StorageUnavailable(f"{self._handle} has ended {self._url} without a word")
        return SavedFile.of_json(self._json)

    async def close(self) -> None:
        await self._answers.aclose()


async def _progress(saves: Sequence[_Save]) -> AsyncGenerator[int, None]:
    """How many bytes are written, whenever there are more, until all files are whole."""
    moved = asyncio.Event()
    tasks = [asyncio.ensure_future(save.finish(moved)) for save in saves]
    for task in tasks:
        task.add_done_callback(lambda _: moved.set())
    try:
        while not all(task.done() for task in tasks):
            await moved.wait()
            moved.clear()
            for task in tasks:
                if task.done():
                    task.result()
            yield sum(save.written for save in saves)
        for task in tasks:
            task.result()
    finally:
        await cancel(tasks)
        for task in tasks:  # of several that failed one has been told of
            task.cancelled() or task.exception()


def _complete(url: str, manifest: Manifest, kept: Set[str]) -> None:
    """Writes the manifest, and removes what it replaces.

    Args:
        kept: generations that others are writing, and its own. Others may begin meanwhile, and are then in it.
    """
    folder = folder_at(url)
    for file in manifest.files:
        _require_visible(folder, file)
    failpoints.reach("checkpoint.manifest", generation=manifest.generation)
    write_manifest(folder, manifest)
    failpoints.reach("checkpoint.complete", generation=manifest.generation)
    remove_older(folder, kept)


def _require_visible(folder: Folder, file: SavedFile) -> None:
    """Raises StorageUnavailable unless the file that a device has written is in the folder that the coordinator sees."""
    where = f"{folder.url}/{file.name}"
    try:
        size = folder.size(file.name)
    except CheckpointNotFound:
        raise StorageUnavailable(
            f"{where} was written by a device and cannot be seen by the coordinator; the folder must be the same for both"
        ) from None
    if size != file.nbytes:
        raise damaged(where, min(size, file.nbytes), max(size, file.nbytes))


async def _file_of(url: str, rank: int) -> SavedFile:
    url = _checked_url(url)
    manifest = await in_thread(lambda: read_manifest(folder_at(url)))
    if rank >= manifest.nranks:
        raise InvalidValue(f"the checkpoint in {url} has {manifest.nranks} ranks, and no rank {rank}")
    return manifest.files[rank]


async def _load_all(handles: Sequence[DeviceHandle], requests: Sequence[pb.LoadShardRequest]) -> list[int]:
    """Bytes that each device has read."""

    async def load(handle: DeviceHandle, request: pb.LoadShardRequest) -> int:
        nbytes = sum(part.numBytes for array in request.arrays for part in array.parts)
        limit_s = _STORAGE_TIMEOUT_S + nbytes / _SLOWEST_STORAGE_BYTES_PER_S
        return int((await handle.call("LoadShard", request, limit_s)).numBytes)

    return await all_or_first_error(
        [load(handle, request) for handle, request in zip(handles, requests, strict=True) if request.arrays]
    )


def _part(url: str, file: SavedFile, source: Source) -> pb.LoadedPart:
    return pb.LoadedPart(
        url=f"{url.rstrip('/')}/{file.name}",
        json=file.only(source.name).to_json(),
        name=source.name,
        start=source.start,
        numBytes=source.nbytes,
    )


def _checked_url(url: str) -> str:
    check_url(url)
    return url.rstrip("/")


def _nbytes(array: pb.ArrayRange) -> int:
    return math.prod(array.shape) * dtype_of(array.dtype).itemsize
