"""GPUDevice: the contract's messages to and from the devices of one server process."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import socket
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dsml_gpu import failpoints
from dsml_gpu.device.dataflow import Dataflow
from dsml_gpu.device.device import Device, Membership, Peer, RankMemory
from dsml_gpu.device.executor import GroupExecution, Links
from dsml_gpu.device.kept import KeptRanges
from dsml_gpu.device.pass_phases import PassPhases, has_begun
from dsml_gpu.device.passes import run_passes
from dsml_gpu.device.point_to_point import PointToPoint
from dsml_gpu.device.preparation import Preparation
from dsml_gpu.device.progress import Progress
from dsml_gpu.device.repeats import Repeats
from dsml_gpu.device.requests import check_slice_bytes, dataflow_of_wire, moved_bytes, operations_of, pass_of
from dsml_gpu.device.shards import load_shard, save_shard
from dsml_gpu.device.undo import Undo
from dsml_gpu.device.waits import Wait
from dsml_gpu.errors import (
    CommNotReady,
    DeviceNotFound,
    DsmlError,
    InvalidValue,
    MemoryNotShared,
    MissingField,
    OperationAborted,
    StreamLength,
)
from dsml_gpu.memory.arena import OpenedArena
from dsml_gpu.memory.device_memory import Download
from dsml_gpu.memory.shared import SharedHandle
from dsml_gpu.transport.data_port import DataPort, listening_host
from dsml_gpu.transport.emulation import DeviceLink, LinkSettings
from dsml_gpu.transport.grpc import ChannelPool, GrpcRecvLink, GrpcSendLink, serve_stream_send
from dsml_gpu.transport.incoming import IncomingTable
from dsml_gpu.transport.link import RecvLink, SendLink
from dsml_gpu.transport.p2p import PipeTable
from dsml_gpu.transport.timer import Timer
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.messages import require
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """How a server's devices move data, and where they say that they are.

    Attributes:
        slice_bytes: chunks are cut into messages of this size.
        stall_timeout_s: whatever does not move for so long fails.
        link: what the link of each device is made to look like; as fast as it is, unless told otherwise.
        host_name: of the host that the devices are on; empty: the machine's own.
        shares_memory: other processes of the same user may open the devices' memory.

    Raises:
        InvalidValue: on construction, where values do not do, or not together.
    """

    slice_bytes: int = 512 << 10
    stall_timeout_s: float = 30.0
    link: LinkSettings = field(default_factory=LinkSettings)
    host_name: str = ""
    shares_memory: bool = True

    def __post_init__(self) -> None:
        check_slice_bytes(self.slice_bytes)
        largest = max(self.slice_bytes, COPY_SLICE_BYTES)
        needed_s = self.link.transmission_s(largest) + self.link.latency_s
        if needed_s > self.stall_timeout_s:
            raise InvalidValue(
                f"a message of {largest} bytes takes {needed_s:.3g} s over the emulated link, longer than "
                f"the stall timeout of {self.stall_timeout_s:g} s"
            )


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
        self._preparation = Preparation()
        self._host_name = settings.host_name or socket.gethostname()
        self._cores = usable_cores()
        #: Name of the server's lane; empty where it has none.
        self.lane = ""
        #: What executions count their slices and passes in.
        self.progress = Progress()
        self._timer = Timer()
        self._emulated: dict[int, DeviceLink] = {}  # by device id
        #: What runs, by device and communicator.
        self._executing: defaultdict[tuple[int, int], set[asyncio.Task[Any]]] = defaultdict(set)
        #: By device and communicator, the last atomic round that is done here, and what it has overwritten.
        self._unsettled: dict[tuple[int, int], tuple[int, Undo]] = {}
        #: By device and communicator, what the last execution waited for that ended otherwise than well.
        self._waits: dict[tuple[int, int], Sequence[Wait]] = {}
        self._repeats = Repeats()
        self._pass_phases: dict[int, PassPhases] = {}  # by device id
        self._incoming = IncomingTable(self._settings.stall_timeout_s, self._timer if self._settings.link.emulated else None)
        self._data_port = DataPort(self._incoming, listening_host(address))
        self._pipes = PipeTable(self._settings.stall_timeout_s)
        self._channels = ChannelPool()
        self._point_to_point = PointToPoint(self._incoming, self._channels, self._settings.stall_timeout_s)

    def add(self, device: Device) -> None:
        """Serves one more device."""
        self._devices[device.device_id] = device
        if self._settings.link.emulated:
            self._emulated[device.device_id] = DeviceLink(self._settings.link, self._timer)

    def remove(self, device_id: int) -> None:
        """Serves a device no more; its memory goes when nothing uses it."""
        del self._devices[device_id]
        self._emulated.pop(device_id, None)
        self._pass_phases.pop(device_id, None)

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
                memories.append(None)
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
        key = (self._device(request.deviceId).device_id, request.commId)
        reach = partial(failpoints.reach, device=key[0], settlement=pb.QuiesceRequest.Settlement.Name(request.settlement))
        reach("settle.begin")
        if request.settlement != pb.QuiesceRequest.COMMIT:
            running = self._executing.get(key, set()).copy()
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running)
        # Asked once more without a settlement, it tells the same.
        waits = self._waits.get(key, ())
        if request.settlement != pb.QuiesceRequest.UNSETTLED:
            self._waits.pop(key, None)
            round_id, undo = self._unsettled.get(key, (0, None))
            if undo is not None and round_id == request.round:
                del self._unsettled[key]
                if request.settlement == pb.QuiesceRequest.ROLL_BACK:
                    await undo.roll_back()
                undo.forget()
            if request.round and (phases := self._pass_phases.get(key[0])) is not None:
                phases.settle(request.round)
        unsettled, _ = self._unsettled.get(key, (0, None))
        reach("settle.done")
        return pb.QuiesceResponse(waits=[wait.to_wire() for wait in waits], unsettledRound=unsettled)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Any) -> AsyncGenerator[pb.HeartbeatResponse, None]:
        if request.intervalMs == 0:
            raise InvalidValue("intervalMs is 0, expected at least 1")
        async with aclosing(self.progress.beats(request.intervalMs / 1000, self._count_executing)) as beats:
            async for beat in beats:
                yield beat

    def _count_executing(self) -> int:
        return sum(map(len, self._executing.values()))

    async def LeaveComm(self, request: pb.LeaveCommRequest, context: Any) -> pb.LeaveCommResponse:
        device = self._device(request.deviceId)
        device.leave(request.commId)
        self._unsettled.pop((device.device_id, request.commId), None)
        self._waits.pop((device.device_id, request.commId), None)
        return pb.LeaveCommResponse()

    async def Execute(self, request: pb.ExecuteRequest, context: Any) -> pb.ExecuteResponse:
        device = self._device(request.deviceId)
        membership = device.membership(request.commId, request.epoch)
        task = asyncio.current_task()
        assert task is not None
        running = self._executing[device.device_id, request.commId]
        running.add(task)
        try:
            failpoints.reach("execute.begin", rank=membership.rank, device=device.device_id)
            if request.kept:
                await self._keep(device, request)
            begun, bytes_sent = await self._run_passes(device, membership, request)
            if request.operations or not (request.passes or request.phase):
                bytes_sent += await self._run_operations(device, membership, request)
        finally:
            running.discard(task)
            if not running:
                self._executing.pop((device.device_id, request.commId), None)
        return pb.ExecuteResponse(bytesSent=bytes_sent, begun=begun)

    async def _keep(self, device: Device, request: pb.ExecuteRequest) -> None:
        key = (device.device_id, request.commId)
        _, last = self._unsettled.pop(key, (0, None))
        if last is not None:
            last.forget()
        ranges = [(piece.recvAddr, piece.count) for piece in request.kept]
        self._unsettled[key] = request.round, KeptRanges(device.arena, device.spare_pieces, ranges)
        await device.arena.memory.finish()

    async def _run_passes(self, device: Device, membership: Membership, request: pb.ExecuteRequest) -> tuple[bool, int]:
        """Returns whether it did something, and how many bytes it moved between the memories of different devices."""
        if request.phase not in pb.ExecuteRequest.Phase.values():
            raise InvalidValue(f"unknown phase {request.phase}")
        if not request.passes or (request.phase == pb.ExecuteRequest.RESUME and not has_begun(membership, request)):
            return False, 0
        passes = [pass_of(one, membership) for one in request.passes]
        for operator, dtype, sources, destinations, weighted in dict.fromkeys(
            (one.operator, one.dtype, len(one.sources), len(one.destinations), bool(one.weights))
            for one in passes
            if len(one.sources) > 1 or one.weights
        ):
            await self._preparation.begin(device.reducer, operator, dtype, sources, destinations, weighted=weighted)
        if request.round:
            await self._phases_of(device).run(membership, request)
        else:
            await run_passes(device, passes)
        self.progress.add(len(passes))
        return True, 0 if request.phase == pb.ExecuteRequest.PREPARE else sum(map(moved_bytes, request.passes))

    def _phases_of(self, device: Device) -> PassPhases:
        phases = self._pass_phases.get(device.device_id)
        if phases is None:
            phases = self._pass_phases[device.device_id] = PassPhases(device)
        return phases

    async def _run_operations(self, device: Device, membership: Membership, request: pb.ExecuteRequest) -> int:
        """Returns how many bytes of payload it sent."""
        slice_bytes = request.sliceBytes or self._settings.slice_bytes
        flows = [dataflow_of_wire(program.SerializeToString()) for program in request.programs]
        operations = operations_of(request.operations, flows, device.arena, slice_bytes)
        stall_timeout_s = request.stallTimeoutMs / 1000 or self._settings.stall_timeout_s
        for operation in operations:
            if operation.dataflow.reduces or operation.weight is not None:
                weighted = operation.weight is not None
                await self._preparation.begin(device.reducer, operation.operator, operation.dtype, weighted=weighted)
        links = self._open_links(device, membership, request.links, flows)
        key = (device.device_id, request.commId)
        self._waits.pop(key, None)
        _, last = self._unsettled.pop(key, (0, None))
        if last is not None:  # this is another round: that one has ended well everywhere
            last.forget()
        undo = Undo(device.spare_pieces) if request.round else None
        execution = GroupExecution(device, membership, links, slice_bytes, stall_timeout_s, self.progress, undo)
        try:
            await execution.run(operations)
        except BaseException:
            self._waits[key] = execution.waits.present()
            if undo is not None:
                await undo.roll_back()
            raise
        if undo is not None:
            self._unsettled[key] = request.round, undo
        failpoints.reach("execute.done", rank=membership.rank, device=device.device_id)
        return execution.bytes_sent

    def _open_links(self, device: Device, membership: Membership, links: Any, flows: list[Dataflow]) -> Links:
        send: dict[int, SendLink] = {}
        recv: dict[int, RecvLink] = {}
        try:
            for link in links:
                peer = membership.peer(link.peer)
                if peer.rank in send or peer.rank in recv:
                    raise InvalidValue(f"rank {peer.rank} has two links; each peer has one")
                if link.sendStreamId:
                    send[peer.rank] = self._send_link(device, peer, link.sendStreamId)
                if link.recvStreamId:
                    recv[peer.rank] = self._recv_link(device, peer, link.recvStreamId)
            for flow in flows:
                missing = [peer for peer in flow.sends if peer not in send]
                missing += [peer for peer in flow.receives if peer not in recv]
                if missing:
                    raise InvalidValue(f"a program moves data to or from rank {missing[0]}, but no link to it is named")
        except DsmlError as error:
            Links(send, recv).abort(OperationAborted(str(error)))
            raise
        return Links(send, recv)

    def _send_link(self, device: Device, peer: Peer, stream_id: int) -> SendLink:
        if peer.p2p:
            return self._pipes.open_send(stream_id, device.arena.memory)
        emulated = self._emulated.get(device.device_id)
        return GrpcSendLink(self._channels.peer(peer.address), stream_id, device.arena.memory, str(peer), emulated)

    def _recv_link(self, device: Device, peer: Peer, stream_id: int) -> RecvLink:
        if peer.p2p:
            return self._pipes.open_recv(stream_id, device.arena.memory)
        incoming = self._incoming.claim(stream_id, link=self._emulated.get(device.device_id))
        return GrpcRecvLink(incoming, device.arena.memory, str(peer))

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
        first = await anext(chunks, None)
        header = None if first is None else first.header
        if first is None or header is None or not header.HasField("memAddr"):
            raise MissingField("the first chunk of StreamHostToDevice must carry deviceId and memAddr")
        device, addr = self._device(header.deviceId.value), header.memAddr.value
        announced = header.numBytes
        device.arena.check(addr, announced)
        written = 0
        chunk: Chunk | None = first
        while chunk is not None:
            data = memoryview(chunk.data)
            if announced and written + data.nbytes > announced:
                raise StreamLength(f"{announced} bytes were announced, {written + data.nbytes} came")
            await device.arena.write(addr + written, data)
            written += data.nbytes
            chunk = await anext(chunks, None)
        if announced and written != announced:
            raise StreamLength(f"{announced} bytes were announced, {written} came")
        await device.arena.memory.finish()
        return pb.StreamHostToDeviceResponse(numBytes=written)

    async def StreamDeviceToHost(self, request: pb.StreamDeviceToHostRequest, context: Any) -> AsyncGenerator[Chunk, None]:
        require(request, "memAddr")
        device = self._device(request.deviceId.value)
        addr, nbytes = request.memAddr.value, request.numBytes
        device.arena.check(addr, nbytes)
        starts = iter(range(addr, addr + nbytes, COPY_SLICE_BYTES))
        under_way: deque[Download] = deque()
        try:
            while True:
                # While one slice is on the network, the next one comes to the host.
                for start in itertools.islice(starts, 2 - len(under_way)):
                    under_way.append(device.arena.begin_read(start, min(COPY_SLICE_BYTES, addr + nbytes - start)))
                if not under_way:
                    return
                yield Chunk(await under_way[0].wait())
                under_way.popleft().release()
        finally:
            for download in under_way:
                download.release()


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
