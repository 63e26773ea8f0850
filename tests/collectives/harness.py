"""Devices of one process, and collectives on them without a coordinator or a client in between."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from dsml_gpu.client.collectives import wire_schedule
from dsml_gpu.coordinator.call import call_of
from dsml_gpu.coordinator.fusion import buckets_of, fused
from dsml_gpu.coordinator.plan import execute_requests, key_of, peers_of, plan_of
from dsml_gpu.device.device import Device
from dsml_gpu.device.service import DeviceService
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.backend import NUMPY, Backend
from dsml_gpu.reduction import wire_dtype
from dsml_gpu.schedules import Schedule
from dsml_gpu.transport.emulation import LinkSettings
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.server import RpcServer

COMM = 1
UNLIMITED = LinkSettings()


class Ranks:
    """`nranks` devices behind one real server, joined to one communicator.

    Attributes:
        fuses: small neighbours of a group travel as one.
    """

    fuses = False

    def __init__(
        self, service: DeviceService, nranks: int, transport: int, backends: Sequence[Backend], memory_bytes: int
    ) -> None:
        self.service = service
        places = itertools.islice(itertools.cycle(backends), nranks)
        self.devices = [Device(number, Arena(memory_bytes, backend)) for number, backend in enumerate(places, 1)]
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

    async def all_reduce(
        self, inputs: Sequence[np.ndarray], op: str, algorithm: str | Schedule, addr: int = 64
    ) -> list[np.ndarray]:
        """The buffers of all ranks afterwards."""
        dtype = inputs[0].dtype
        for device, values in zip(self.devices, inputs, strict=True):
            await write(device.arena, addr, values)
        await self.run([all_reduce_request((addr,) * len(inputs), inputs[0].nbytes, dtype, op, algorithm)])
        return [await read(device.arena, addr, dtype, inputs[0].size) for device in self.devices]

    async def run(self, requests: Sequence[pb.CollectiveRequest], hosts: Sequence[int] = ()) -> None:
        """Runs collectives as one group, as a coordinator would.

        Args:
            hosts: the host of each rank; none: all on one.
        """
        execute = self.execute_requests(requests, hosts)
        await asyncio.gather(*(self.service.Execute(request, None) for request in execute))

    def execute_requests(
        self, requests: Sequence[pb.CollectiveRequest], hosts: Sequence[int] = ()
    ) -> list[pb.ExecuteRequest]:
        """What a coordinator would tell each rank."""
        nranks = len(self.devices)
        calls = [call_of(request, nranks) for request in requests]
        if self.fuses:
            calls = [fused(bucket) for bucket in buckets_of(calls)]
        plans = [plan_of(key_of(call, call.algorithm, tuple(hosts) or (0,) * nranks)) for call in calls]
        return execute_requests(COMM, [device.device_id for device in self.devices], list(zip(calls, plans, strict=True)))


def all_reduce_request(
    addrs: Sequence[int], count: int, dtype: np.dtype, op: str = "SUM", algorithm: str | Schedule = "ring"
) -> pb.CollectiveRequest:
    """An all-reduce in place.

    Args:
        addrs: of each rank.
        count: bytes.
        algorithm: its name, or a schedule.
    """
    return pb.CollectiveRequest(
        kind=pb.CollectiveRequest.ALL_REDUCE,
        counts=[count],
        dtype=pb.DataType.Name(wire_dtype(dtype)),
        op=op,
        buffers=[pb.RankBuffers(sendAddr=addr, recvAddr=addr) for addr in addrs],
        algorithm=algorithm if isinstance(algorithm, str) else algorithm.algorithm,
        schedule=None if isinstance(algorithm, str) else wire_schedule(algorithm),
    )


@asynccontextmanager
async def ranks(
    nranks: int,
    transport: int,
    slice_bytes: int = 4096,
    stall_timeout_s: float = 10.0,
    backends: Sequence[Backend] = (NUMPY,),
    memory_bytes: int = 64 << 20,
    link: LinkSettings = UNLIMITED,
) -> AsyncIterator[Ranks]:
    """Devices whose chunks are cut finely, so that small buffers have many slices; they take the backends in turn."""
    server = RpcServer("127.0.0.1", 0)
    server.bind()
    service = DeviceService(server.address, TransferSettings(slice_bytes, stall_timeout_s, link))
    await server.start({"GPUDevice": service}, 60.0)
    world = Ranks(service, nranks, transport, backends, memory_bytes)
    await world.join()
    try:
        yield world
        await _until_no_stream_is_open(service, stall_timeout_s)
    finally:
        await server.stop(0)
        await service.close()


async def write(arena: Arena, addr: int, values: np.ndarray) -> None:
    """Values into device memory."""
    await arena.write(addr, np.ascontiguousarray(values).view(np.uint8))
    await arena.memory.finish()


async def read(arena: Arena, addr: int, dtype: np.dtype, count: int) -> np.ndarray:
    """A copy of values in device memory."""
    download = arena.begin_read(addr, count * dtype.itemsize)
    values = np.frombuffer((await download.wait()).tobytes(), dtype)
    download.release()
    return values


async def _until_no_stream_is_open(service: DeviceService, stall_timeout_s: float) -> None:
    """After success there is none; one whose other end never came goes by itself within the stall timeout."""
    deadline = asyncio.get_running_loop().time() + stall_timeout_s + 1
    while len(service._incoming) + len(service._pipes):
        assert asyncio.get_running_loop().time() < deadline, "streams stay open"
        await asyncio.sleep(0.02)
