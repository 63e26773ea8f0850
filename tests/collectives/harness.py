"""Devices of one process, and collectives on them without a coordinator or a client in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from dsml_gpu.coordinator.plan import Collective, execute_requests, peers_of
from dsml_gpu.device.device import Device
from dsml_gpu.device.service import DeviceService, TransferSettings
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import NUMPY, Backend
from dsml_gpu.reduction import wire_dtype
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.server import RpcServer

COMM = 1


class Ranks:
    """`nranks` devices behind one real server, joined to one communicator."""

    def __init__(self, service: DeviceService, nranks: int, transport: int, backend: Backend) -> None:
        self.service = service
        self.devices = [Device(number, Arena(64 << 20, backend)) for number in range(1, nranks + 1)]
        for device in self.devices:
            service.add(device)
        self._transport = transport

    async def join(self) -> None:
        metadata = [self.service.metadata(device) for device in self.devices]
        for rank, device in enumerate(self.devices):
            peers = peers_of(metadata, rank, self._transport)
            await self.service.JoinComm(
                pb.JoinCommRequest(commId=COMM, rank=rank, peers=peers, deviceId=device.device_id), None
            )

    async def all_reduce(self, inputs: Sequence[np.ndarray], op: str, algorithm: str, addr: int = 64) -> list[np.ndarray]:
        """The buffers of all ranks afterwards."""
        dtype, count = inputs[0].dtype, inputs[0].nbytes
        for device, values in zip(self.devices, inputs, strict=True):
            device.arena.write(addr, np.ascontiguousarray(values).view(np.uint8).data)
        collective = Collective(
            "all_reduce", algorithm, (addr,) * len(inputs), count, wire_dtype(dtype), pb.ReduceOp.Value(op)
        )
        await self.run([collective])
        return [np.frombuffer(device.arena.read(addr, count), dtype) for device in self.devices]

    async def run(self, collectives: Sequence[Collective]) -> None:
        requests = execute_requests(COMM, [device.device_id for device in self.devices], collectives)
        await asyncio.gather(*(self.service.Execute(request, None) for request in requests))


@asynccontextmanager
async def ranks(
    nranks: int,
    transport: int,
    slice_bytes: int = 4096,
    stall_timeout_s: float = 10.0,
    backend: Backend = NUMPY,
) -> AsyncIterator[Ranks]:
    """Devices whose chunks are cut finely, so that small buffers have many slices."""
    server = RpcServer("127.0.0.1", 0)
    server.bind()
    service = DeviceService(server.address, TransferSettings(slice_bytes, stall_timeout_s))
    await server.start({"GPUDevice": service}, 60.0)
    world = Ranks(service, nranks, transport, backend)
    await world.join()
    try:
        yield world
        await _until_no_stream_is_open(service, stall_timeout_s)
    finally:
        await server.stop(0)
        await service.close()


async def _until_no_stream_is_open(service: DeviceService, stall_timeout_s: float) -> None:
    """After success there is none; one whose other end never came goes by itself within the stall timeout."""
    deadline = asyncio.get_running_loop().time() + stall_timeout_s + 1
    while len(service._incoming) + len(service._pipes):
        assert asyncio.get_running_loop().time() < deadline, "streams stay open"
        await asyncio.sleep(0.02)
