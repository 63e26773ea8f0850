"""Four devices of this process and what a coordinator does to write checkpoints of them, without a server between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import aclosing

import numpy as np

from dsml_gpu.checkpoints.folders import Folder, folder_at
from dsml_gpu.checkpoints.manifest import read_manifest
from dsml_gpu.checkpoints.shards import check_header, checked_bytes
from dsml_gpu.coordinator.checkpoints import Checkpoints
from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.coordinator.embedded import DeviceService, EmbeddedDevices, TransferSettings
from dsml_gpu.coordinator.epochs import Epoch
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.wire import gpu_sim_pb2 as pb

NRANKS = 4
TIMEOUT_S = 60.0
#: Of each rank's two arrays: one of several pieces, and one that shares a page with others.
COUNTS = {"weights": (3 << 18) + 5, "step": 3}


class Rig:
    """Made within an event loop.

    Args:
        counts: elements (float32) of the arrays.
    """

    def __init__(self, counts: dict[str, int] | None = None) -> None:
        self.comm_id = 1
        self.epoch = Epoch(1, tuple(range(NRANKS)))
        self.counts = COUNTS if counts is None else counts
        self._service = DeviceService("127.0.0.1:1", TransferSettings())
        embedded = EmbeddedDevices(self._service, NRANKS, 64 << 20, (NUMPY,))
        self.handles: Sequence[DeviceHandle] = [embedded.create([], permanent=True) for _ in range(NRANKS)]
        self._checkpoints = Checkpoints(TIMEOUT_S)

    async def write(self, number: int) -> None:
        """Fills the arrays with what checkpoint `number` is to have."""
        for rank, handle in enumerate(self.handles):
            for name, data in contents(number, rank, self.counts).items():
                await self._arena(handle).write(self._addr(name), data)

    async def checkpoint(self, url: str) -> list[pb.CheckpointProgress]:
        """Writes one; returns what was said of it."""
        request = pb.CheckpointRequest(commId=1, url=url, arrays=self.messages())
        async with aclosing(self._checkpoints.save(self, request)) as answers:
            return [answer async for answer in answers]

    async def restore(self, url: str) -> int:
        request = pb.RestoreRequest(commId=1, url=url, arrays=self.messages())
        return (await self._checkpoints.restore(self, request)).numBytes

    def memory(self, rank: int) -> dict[str, np.ndarray]:
        """What the arrays hold."""
        arena = self._arena(self.handles[rank])
        return {name: arena.view(self._addr(name), 4 * count).view("<f4").copy() for name, count in self.counts.items()}

    def messages(self) -> list[pb.CheckpointArray]:
        return [
            pb.CheckpointArray(
                name=name,
                dtype="FLOAT32",
                parts=[pb.ArrayPart(shape=[count], memAddr=self._addr(name)) for _ in self.handles],
            )
            for name, count in self.counts.items()
        ]

    async def close(self) -> None:
        await self._service.close()

    def _addr(self, name: str) -> int:
        return 4096 + (16 << 20) * list(self.counts).index(name)

    def _arena(self, handle: DeviceHandle):
        return self._service._devices[handle.device_id].arena


def contents(number: int, rank: int, counts: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    """What rank `rank` has in checkpoint `number`: no two words of any two checkpoints are the same in one place."""
    made = {}
    for index, (name, count) in enumerate((COUNTS if counts is None else counts).items()):
        words = np.arange(count, dtype=np.uint32) * np.uint32(2654435761)
        made[name] = (words + np.uint32(number * 1000003 + rank * 7919 + index)).view("<f4")
    return made


def read_back(folder: Folder) -> list[dict[str, bytes]]:
    """All that the checkpoint of a folder has, by rank. Raises where it is not whole and sound."""
    manifest = read_manifest(folder)
    for file in manifest.files:
        check_header(folder, file)
    return [
        {array.name: b"".join(checked_bytes(folder, file, array, 0, array.nbytes)) for array in file.arrays}
        for file in manifest.files
    ]


def number_of(url: str, numbers: Iterator[int] | Sequence[int], counts: dict[str, int] | None = None) -> int:
    """Which of several checkpoints a folder has, bit for bit."""
    found = read_back(folder_at(url))
    assert len(found) == NRANKS
    for number in numbers:
        expected = [contents(number, rank, counts) for rank in range(NRANKS)]
        if found == [{name: data.tobytes() for name, data in one.items()} for one in expected]:
            return number
    raise AssertionError(f"{url} has none of the checkpoints that were written")
