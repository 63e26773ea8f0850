"""GPUDevice: the contract's messages to and from the devices of one server process."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from dsml_gpu import failpoints
from dsml_gpu.device.copies import read_pieces, write_chunks
from dsml_gpu.device.device import Device, Membership, Peer, RankMemory
from dsml_gpu.device.executions import Executions
from dsml_gpu.device.links import LinkOpener
from dsml_gpu.device.point_to_point import PointToPoint
from dsml_gpu.device.progress import Progress
from dsml_gpu.device.repeats import Repeats
from dsml_gpu.device.settings import TransferSettings
from dsml_gpu.device.shards import load_shard, save_shard
from dsml_gpu.errors import (
    CommNotReady,
    DeviceNotFound,
    DsmlError,
    InvalidValue,
    MemoryNotShared,
)
from dsml_gpu.memory.arena import OpenedArena
from dsml_gpu.memory.shared import SharedHandle
from dsml_gpu.transport.data_port import DataPort, listening_host
from dsml_gpu.transport.emulation import DeviceLink
from dsml_gpu.transport.grpc import ChannelPool, serve_stream_send
from dsml_gpu.transport.incoming import IncomingTable
from dsml_gpu.transport.p2p import PipeTable
from dsml_gpu.transport.timer import Timer
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.chunk_streams import with_header
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.messages import require
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES


class DeviceService:
    """Servicer of GPUDevice for one or more devices of this process.

    Methods named as RPCs take ``(request, context)`` and never use the context, so that a coordinator can call them in its
    own process.

    Args:
        address: host:port of the server, as others reach it.
        settings: defaults for requests that name none.
    """

    def __init__(self, address: str, settings: TransferSettings) -> None:
        self._address = address
        self._process_uid = secrets.token_hex(8)
        self._settings = settings
        self._devices: dict[int, Device] = {}
        self._host_name = settings.host_name or socket.gethostname()
        self._cores = usable_cores()
        #: Name of the server's lane; empty where it has none.
        self.lane = ""
        #: Counts the slices and passes of executions.
        self.progress = Progress()
        self._timer = Timer()
        self._emulated: dict[int, DeviceLink] = {}  # by device id
        self._repeats = Repeats()
        self._incoming = IncomingTable(self._settings.stall_timeout_s, self._timer if self._settings.link.emulated else None)
        self._data_port = DataPort(self._incoming, listening_host(address))
        self._pipes = PipeTable(self._settings.stall_timeout_s)
        self._channels = ChannelPool()
        self._point_to_point = PointToPoint(self._incoming, self._channels, self._settings.stall_timeout_s)
        self._links = LinkOpener(self._incoming, self._channels, self._pipes, self._emulated)
        self._executions = Executions(self._links, settings, self.progress)

    def add(self, device: Device) -> None:
        """Serves one more device."""
        self._devices[device.device_id] = device
        if self._settings.link.emulated:
            self._emulated[device.device_id] = DeviceLink(self._settings.link, self._timer)

    def remove(self, device_id: int) -> None:
        """Serves a device no more; its memory goes when nothing uses it."""
        del self._devices[device_id]
        self._emulated.pop(device_id, None)
        self._executions.remove(device_id)

    async def close(self) -> None:
        """Gives up all transfers and closes the connections to peers."""
        await self._point_to_point.close()
        await self._channels.close()
        self._data_port.close()
        self._timer.close()

    def _device(self, device_id: int) -> Device:
        if device_id == 0:
            if len(self._devices) == 1:
                return next(iter(self._devices.values()))
            raise InvalidValue(f"this server hosts {len(self._devices)} devices; name one by its id")
        device = self._devices.get(device_id)
        if device is None:
            raise DeviceNotFound(f"no device {device_id} on this server; it hosts {sorted(self._devices) or 'none'}")
        return device

    # ---- the original contract ----------------------------------------------------------------------------------------

    async def GetDeviceMetadata(self, request: pb.GetDeviceMetadataRequest, context: Any) -> pb.GetDeviceMetadataResponse:
        # A client of the original contract names no device: it learns of the first.
        first = next(iter(self._devices), 0)
        return pb.GetDeviceMetadataResponse(
            metadata=self.metadata(self._device(request.deviceId or first)),
            devices=[self.metadata(device) for device in self._devices.values()],
        )

    def metadata(self, device: Device) -> pb.DeviceMetadata:
        """What the contract tells of a device."""
        arena = device.arena
        return pb.DeviceMetadata(
            deviceId=pb.DeviceId(value=device.device_id),
            minMemAddr=pb.MemAddr(value=arena.min_addr),
            maxMemAddr=pb.MemAddr(value=arena.max_addr),
            address=self._address,
            backend=arena.backend.name,
            deviceName=arena.backend.device_name,
            processUid=self._process_uid,
            gpu=arena.backend.gpu,
            linkLatencyNs=round(self._settings.link.latency_s * 1e9),
            linkBytesPerS=round(self._settings.link.bytes_per_s),
            host=self._host_name,
            cores=self._cores,
            lane=self.lane,
        )

    async def BeginSend(self, request: pb.BeginSendRequest, context: Any) -> pb.BeginSendResponse:
        require(request, "sendBuffAddr", "dstRank")
        device = self._device(request.deviceId)
        device.arena.check(request.sendBuffAddr.value, request.numBytes)
        peer = _joined(device, request.commId).peer(request.dstRank.value)
        link = self._emulated.get(device.device_id)
        stream_id = self._point_to_point.begin_send(device, request.sendBuffAddr.value, request.numBytes, peer, link)
        return pb.BeginSendResponse(initiated=True, streamId=pb.StreamId(value=stream_id))

    async def BeginReceive(self, request: pb.BeginReceiveRequest, context: Any) -> pb.BeginReceiveResponse:
        require(request, "streamId", "recvBuffAddr", "srcRank")
        if request.streamId.value == 0:
            raise InvalidValue("streamId is 0, expected the id that BeginSend gave")
        device = self._device(request.deviceId)
        device.arena.check(request.recvBuffAddr.value, request.numBytes)
        _joined(device, request.commId).peer(request.srcRank.value)
        self._point_to_point.begin_receive(
            device,
            request.streamId.value,
            request.recvBuffAddr.value,
            request.numBytes,
            self._emulated.get(device.device_id),
        )
        return pb.BeginReceiveResponse(initiated=True)

    async def StreamSend(self, chunks: AsyncIterator[Chunk], context: Any) -> pb.StreamSendResponse:
        if not self._incoming.is_emulated:
            await self._data_port.announce(context)
        await serve_stream_send(self._incoming, chunks)
        return pb.StreamSendResponse(success=True)

    async def GetStreamStatus(self, request: pb.GetStreamStatusRequest, context: Any) -> pb.GetStreamStatusResponse:
        require(request, "streamId")
        status = self._point_to_point.status(request.streamId.value)
        return pb.GetStreamStatusResponse(status=pb.Status.Name(status.state), message=status.message)

    # ---- additive -----------------------------------------------------------------------------------------------------

    async def JoinComm(self, request: pb.JoinCommRequest, context: Any) -> pb.JoinCommResponse:
        device = self._device(request.deviceId)
        failpoints.reach("comm.join", device=device.device_id, epoch=request.epoch)
        response = pb.JoinCommResponse()
        peers: list[Peer] = []
        memories: list[RankMemory | None] = []
        for rank, peer in enumerate(request.peers):
            peers.append(Peer(rank, peer.deviceId, peer.address, peer.transport == pb.P2P))
            try:
                memories.append(self._open_memory(device, peer))
            except MemoryNotShared as error:
                known = None
                if not peer.HasField("sharedMemory"):
                    # Of one that is lost nobody may know any more where it is; who has it open has it as long as it wants.
                    known = device.opened_before(request.commId, request.epoch, rank, peer.deviceId)
                memories.append(known)
                if known is None:
                    response.unreachable.add(rank=rank, reason=str(error))
        device.join(Membership(request.commId, request.rank, tuple(peers), tuple(memories), request.epoch))
        failpoints.reach("comm.joined", device=device.device_id, epoch=request.epoch)
        return response

    def _open_memory(self, device: Device, peer: pb.Peer) -> RankMemory:
        """The memory of a peer. Raises MemoryNotShared."""
        near = self._devices.get(peer.deviceId)
        if near is not None and peer.transport == pb.P2P:
            return near.arena
        if not peer.HasField("sharedMemory"):
            raise MemoryNotShared("nobody said where it is")
        memory, handle = device.arena.memory, SharedHandle.of_message(peer.sharedMemory)
        array = memory.open_shared(handle)
        staging = memory.open_staging(handle) if handle.staging_bytes else None
        return OpenedArena(array, peer.sharedMemory.minMemAddr.value, staging)

    async def ShareMemory(self, request: pb.ShareMemoryRequest, context: Any) -> pb.SharedMemory:
        device = self._device(request.deviceId)
        if not self._settings.shares_memory:
            raise MemoryNotShared("the server was told not to share memory")
        handle = device.arena.share()
        if request.move:
            failpoints.reach("memory.move", device=device.device_id)
            await asyncio.to_thread(device.arena.move)
            handle = device.arena.share()
        return pb.SharedMemory(
            bootId=handle.boot_id,
            pid=handle.pid,
            fd=handle.fd,
            token=handle.token,
            offset=handle.offset,
            numBytes=handle.nbytes,
            cudaIpcHandle=handle.cuda_ipc_handle,
            minMemAddr=pb.MemAddr(value=device.arena.min_addr),
            stagingBytes=handle.staging_bytes,
        )

    async def Quiesce(self, request: pb.QuiesceRequest, context: Any) -> pb.QuiesceResponse:
        if request.settlement not in pb.QuiesceRequest.Settlement.values():
            raise InvalidValue(f"unknown settlement {request.settlement}")
        return await self._executions.quiesce(self._device(request.deviceId), request)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> AsyncGenerator[pb.HeartbeatResponse, None]:
        if request.intervalMs == 0:
            raise InvalidValue("intervalMs is 0, expected at least 1")
        async with aclosing(self.progress.beats(request.intervalMs / 1000, self._executions.count)) as beats:
            async for beat in beats:
                yield beat

    async def LeaveComm(self, request: pb.LeaveCommRequest, context: Any) -> pb.LeaveCommResponse:
        device = self._device(request.deviceId)
        device.leave(request.commId)
        self._executions.leave(device, request.commId)
        return pb.LeaveCommResponse()

    async def Execute(self, request: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:
        return await self._executions.run(self._device(request.deviceId), request)

    async def SaveShard(self, request: pb.SaveShardRequest, context: Any) -> AsyncGenerator[pb.SaveShardResponse, None]:
        async with aclosing(save_shard(self._device(request.deviceId), request)) as answers:
            async for answer in answers:
                yield answer

    async def LoadShard(self, request: pb.LoadShardRequest, context: Any) -> pb.LoadShardResponse:
        return await load_shard(self._device(request.deviceId), request)

    async def Malloc(self, request: pb.MallocRequest, context: Any) -> pb.MallocResponse:
        allocator = self._device(request.deviceId.value).allocator

        def work() -> pb.MallocResponse:
            if request.HasField("at"):
                addr = allocator.malloc_at(request.at, request.numBytes, request.commId)
            else:
                addr = allocator.malloc(request.numBytes, request.commId)
            return pb.MallocResponse(memAddr=pb.MemAddr(value=addr))

        return self._repeats.once(request.idempotencyKey, work)

    async def Free(self, request: pb.FreeRequest, context: Any) -> pb.FreeResponse:
        require(request, "memAddr")
        allocator = self._device(request.deviceId.value).allocator

        def work() -> pb.FreeResponse:
            allocator.free(request.memAddr.value, request.commId)
            return pb.FreeResponse()

        return self._repeats.once(request.idempotencyKey, work)

    async def StreamHostToDevice(self, chunks: AsyncIterator[Chunk], context: Any) -> pb.StreamHostToDeviceResponse:
        header, all_chunks = await with_header(chunks)
        require(header, "memAddr")
        arena = self._device(header.deviceId.value).arena
        written = await write_chunks(arena, header.memAddr.value, header.numBytes, all_chunks)
        return pb.StreamHostToDeviceResponse(numBytes=written)

    async def StreamDeviceToHost(self, request: pb.StreamDeviceToHostRequest, context: Any) -> AsyncGenerator[Chunk, None]:
        require(request, "memAddr")
        arena = self._device(request.deviceId.value).arena
        addr, nbytes = request.memAddr.value, request.numBytes
        arena.check(addr, nbytes)
        async with aclosing(read_pieces(arena, addr, nbytes, COPY_SLICE_BYTES)) as pieces:
            async for piece in pieces:
                yield Chunk(piece)


def usable_cores() -> int:
    """Cores that this process may run on; 0 where the system does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 0


def _joined(device: Device, comm_id: int) -> Membership:
    try:
        return device.membership(comm_id)
    except DsmlError as error:
        raise CommNotReady(f"{error}; JoinComm tells a device where its peers are") from None
