"""Devices inside the coordinator's own process; the one file in which the coordinator knows the device package."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from dsml_gpu.coordinator.device_handle import DeviceHandle
from dsml_gpu.device.device import Device
from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.errors import OutOfDevices
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import Backend
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.lane import Lane

__all__ = ["DeviceService", "EmbeddedDevices", "TransferSettings"]


class EmbeddedDevices:
    """Makes and ends devices of this process.

    Args:
        service: serves them to other device servers.
        limit: how many there may be at a time.
        memory_bytes: address space of each.
        backends: where their memory is; new devices take them in turn.
    """

    def __init__(self, service: DeviceService, limit: int, memory_bytes: int, backends: Sequence[Backend]) -> None:
        self.service = service
        self.limit = limit
        self._memory_bytes = memory_bytes
        self._backends = itertools.cycle(backends)
        self._count = 0
        self._last_id = 0

    def __len__(self) -> int:
        return self._count

    def create(self, taken_ids: Iterable[int], permanent: bool) -> DeviceHandle:
        """A new device with an id of its own.

        Raises:
            OutOfDevices: the limit is reached.
        """
        if self._count >= self.limit:
            raise OutOfDevices(f"the limit of {self.limit} embedded devices is reached")
        # Ids are never used again: a request for a device that has ended must not reach the next one's memory.
        taken = set(taken_ids)
        device_id = next(number for number in itertools.count(self._last_id + 1) if number not in taken)
        self._last_id = device_id
        device = Device(device_id, Arena(self._memory_bytes, next(self._backends)))
        self.service.add(device)
        self._count += 1
        metadata = self.service.metadata(device)
        handle = DeviceHandle(_LocalConnection(self.service), metadata.address, embedded=True, permanent=permanent)
        handle.metadata.CopyFrom(metadata)
        handle.answers = True
        return handle

    def end(self, handle: DeviceHandle) -> None:
        """Ends a device; its memory goes back to the system."""
        handle.end()
        self.service.remove(handle.device_id)
        self._count -= 1

    async def close(self) -> None:
        await self.service.close()


class _LocalConnection:
    """Calls the servicer itself; there is no connection that could time out."""

    lane: Lane | None = None

    def __init__(self, service: DeviceService) -> None:
        self.on_lane_end: Callable[[], None] = lambda: None
        self._service = service

    @property
    def tells_of_its_end(self) -> bool:
        return True

    async def open_lane(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        return await getattr(self._service, method)(request, None)

    async def write(self, chunks: AsyncIterator[Chunk]) -> pb.StreamHostToDeviceResponse:
        return await self._service.StreamHostToDevice(chunks, None)

    def read(self, request: pb.StreamDeviceToHostRequest, loss: asyncio.Future[str]) -> AsyncGenerator[Chunk, None]:
        return self._service.StreamDeviceToHost(request, None)

    def stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        answers: AsyncGenerator[Any, None] = getattr(self._service, method)(request, None)
        return answers
