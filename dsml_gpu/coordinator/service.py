"""GPUCoordinator: the contract's messages to and from communicators and devices."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dsml_gpu.coordinator import groups
from dsml_gpu.coordinator.call import CollectiveCall, all_reduce_call, call_of
from dsml_gpu.coordinator.checkpoints import Checkpoints, LastCheckpoint
from dsml_gpu.coordinator.choice import Chooser
from dsml_gpu.coordinator.commits import Commits
from dsml_gpu.coordinator.communicator import Communicator
from dsml_gpu.coordinator.device_handle import DeviceHandle, pieces
from dsml_gpu.coordinator.epochs import Epoch
from dsml_gpu.coordinator.heartbeats import DEFAULT_DETECTION, Detection
from dsml_gpu.coordinator.journal import Journal
from dsml_gpu.coordinator.order import Turn
from dsml_gpu.coordinator.outcomes import Asked, Outcomes
from dsml_gpu.coordinator.ranks import RunSettings
from dsml_gpu.coordinator.records import KnownCommunicator, KnownServer, Member, Membership, Recovered
from dsml_gpu.coordinator.registry import DeviceRegistry
from dsml_gpu.coordinator.remembered import forget, remembered
from dsml_gpu.coordinator.replacement import Allocations, Place, replace
from dsml_gpu.coordinator.resume import resume
from dsml_gpu.errors import (
    CommNotFound,
    InternalError,
    InvalidValue,
    MessageTooLarge,
    MissingField,
    OperationTimeout,
    StreamLength,
)
from dsml_gpu.schedules.cost_model import DEFAULT_COST_MODEL, CostModel
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.messages import require
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

M = TypeVar("M")

#: Requests that are longer are not remembered.
_MAX_REMEMBERED_BYTES = 16 << 10
#: How often a server that has registered hears that it is.
_REPEAT_REGISTRATION_S = 5.0
#: A copy by a client itself may take the stall timeout and what it needs at this speed, far below that of any memory.
_SLOWEST_COPY_BYTES_PER_S = 100e6


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """How a coordinator runs collectives.

    Attributes:
        transport: number of ``enum Transport`` for communicators that ask for none.
        stall_timeout_s: a collective in which nothing moves for so long fails.
        operation_timeout_s: a group that takes longer fails, moving or not.
        max_message_bytes: of an answer.
        cost_model: by which algorithms are chosen.
        cost_model_file: takes what `SetCostModel` brings; None: it is forgotten when the coordinator ends.
        detection: when devices count as dead.
        atomic: see `RunSettings`.
        on_failure: number of ``enum OnFailure`` for communicators that ask for none.
    """

    transport: int = pb.AUTO
    stall_timeout_s: float = 30.0
    operation_timeout_s: float = 600.0
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    cost_model: CostModel = DEFAULT_COST_MODEL
    cost_model_file: Path | None = None
    detection: Detection = DEFAULT_DETECTION
    atomic: bool = True
    on_failure: int = pb.SHRINK


class CoordinatorService:
    """Servicer of GPUCoordinator.

    Args:
        journal: gets what must not be forgotten; what is in it is still known (`resume`).
    """

    def __init__(self, registry: DeviceRegistry, settings: CoordinatorSettings, journal: Journal) -> None:
        self._registry = registry
        self._settings = settings
        self._journal = journal
        self._recovered = journal.load()
        self._outcomes = Outcomes(journal, self._recovered.outcomes)
        self._commits = Commits(journal, self._recovered.rounds, self._recovered.begun, self._outcomes.has)
        self._comms: dict[int, Communicator] = {}
        #: Name of the server's lane; empty where it has none.
        self.lane = ""
        self._chooser = Chooser(settings.cost_model)
        self._checkpoints = Checkpoints(settings.operation_timeout_s)
        self._allocations = Allocations()
        # Devices are chosen after a round of questions to their servers; nobody else may choose meanwhile.
        self._choosing = asyncio.Lock()
        self._stops = asyncio.Event()

    async def resume(self) -> None:
        """Goes on with the communicators of the coordinator before. To be called once, before anything is served."""
        resumed, over = await resume(self._recovered, self._registry, self._commits.numbers)
        self._recovered = Recovered()
        for comm_id in over:
            self._journal.forget_communicator(comm_id)
            self._commits.forget(comm_id)
        for one in resumed:
            known = one.known
            settings = self._run_settings(known.transport)
            comm = self._comms[known.comm_id] = Communicator(
                known.comm_id, one.handles, self._chooser, settings, known.on_failure, self, self._commits, one.past
            )
            for handle in one.handles:
                handle.comm_ids.add(known.comm_id)
            begun = self._commits.unfinished(known.comm_id)
            if begun is not None and await comm.finish(begun):
                log.info("communicator %d: what was under way over shared memory has been brought to its end", known.comm_id)
            if known.checkpoint:
                self._checkpoints.set_last(known.comm_id, LastCheckpoint(known.checkpoint, known.checkpoint_seats))

    async def close(self, drain_s: float) -> None:
        """Waits for running collectives, cancels what is not done after `drain_s`, and takes leave of devices.

        Communicators that a next coordinator can go on with stay: their devices hear nothing.
        """
        comms = list(self._comms.values())
        await asyncio.gather(*(comm.drain(drain_s) for comm in comms))
        await self._outcomes.close()
        stay = [comm for comm in comms if self._journal.lasts and not any(handle.embedded for handle in comm.handles)]
        await asyncio.gather(*(self._destroy(comm) for comm in comms if comm not in stay))

    def _comm(self, comm_id: int) -> Communicator:
        comm = self._comms.get(comm_id)
        if comm is None:
            raise CommNotFound(f"no communicator {comm_id}; {len(self._comms)} exist")
        return comm

    async def _once(
        self,
        method: str,
        request: Any,
        comm_id: int,
        context: Any,
        work: Callable[[], Awaitable[M]],
        keep: Callable[[M], None] | None = None,
    ) -> M:
        return await self._outcomes.once(Asked(request.idempotencyKey, comm_id, method), context, work, keep)

    def _device(self, message: Any, field: str) -> DeviceHandle:
        require(message, field)
        return self._registry.device(getattr(message, field).value)

    # ---- communicators ------------------------------------------------------------------------------------------------

    async def CommInit(self, request: pb.CommInitRequest, context: Any) -> pb.CommInitResponse:
        def keep(answer: pb.CommInitResponse) -> None:
            one = KnownCommunicator(answer.commId, *self._choices(request))
            self._journal.put_communicator(one)
            comm = self._comms[one.comm_id]
            self.begin_epoch(one.comm_id, comm.epoch, comm.handles)

        return await self._once("CommInit", request, 0, context, lambda: self._comm_init(request), keep)

    async def _comm_init(self, request: pb.CommInitRequest) -> pb.CommInitResponse:
        _check_number(request)
        if request.transport not in pb.Transport.values():
            raise InvalidValue(f"unknown transport {request.transport}; known: {', '.join(pb.Transport.keys())}")
        if request.onFailure not in pb.OnFailure.values():
            raise InvalidValue(f"unknown onFailure {request.onFailure}; known: {', '.join(pb.OnFailure.keys())}")
        comm_id = _new_comm_id()
        handles = await self._take(request, comm_id)
        transport, on_failure = self._choices(request)
        settings = self._run_settings(transport)
        comm = Communicator(comm_id, handles, self._chooser, settings, on_failure, self, self._commits)
        try:
            await comm.join()
        except BaseException:
            await asyncio.shield(self._give_back(comm))
            raise
        self._comms[comm_id] = comm
        return pb.CommInitResponse(
            success=True, commId=comm_id, devices=[handle.metadata for handle in handles], lane=self.lane
        )

    async def _take(self, request: pb.CommInitRequest | pb.CommGrowRequest, comm_id: int) -> list[DeviceHandle]:
        async with self._choosing:
            if request.deviceIds:
                return await self._registry.take_named(list(request.deviceIds), comm_id)
            return await self._registry.take(request.numDevices, comm_id)

    async def CommGrow(self, request: pb.CommGrowRequest, context: Any) -> pb.CommGrowResponse:
        return await self._once("CommGrow", request, request.commId, context, lambda: self._comm_grow(request))

    async def _comm_grow(self, request: pb.CommGrowRequest) -> pb.CommGrowResponse:
        comm = self._comm(request.commId)
        _check_number(request)
        comm.check_growing(request.numDevices)
        await comm.leave_lost_behind()  # a device that was restarted may come in anew
        named = {handle.device_id for handle in comm.handles} & set(request.deviceIds)
        if named:
            raise InvalidValue(f"device {min(named)} is in communicator {comm.comm_id} already")
        handles = await self._take(request, comm.comm_id)
        try:
            await comm.grow(handles)
        except BaseException:
            self._registry.release(handles, comm.comm_id)
            raise
        return pb.CommGrowResponse(epoch=comm.epoch.number, devices=[handle.metadata for handle in comm.handles])

    def _run_settings(self, transport: int) -> RunSettings:
        settings = self._settings
        return RunSettings(transport, round(settings.stall_timeout_s * 1000), settings.operation_timeout_s, settings.atomic)

    def _choices(self, request: pb.CommInitRequest) -> tuple[int, int]:
        """Numbers of the transport and of ``enum OnFailure`` of a communicator."""
        return request.transport or self._settings.transport, request.onFailure or self._settings.on_failure

    def begin_epoch(self, comm_id: int, epoch: Epoch, handles: Sequence[DeviceHandle]) -> None:
        """See `communicator.Keeper`."""
        members = tuple(
            Member(handle.device_id, handle.address, handle.metadata.processUid, seat, handle.embedded)
            for handle, seat in zip(handles, epoch.seats, strict=True)
        )
        self._journal.put_membership(Membership(comm_id, epoch.number, members))

    def let_go(self, comm_id: int, handles: Sequence[DeviceHandle]) -> None:
        """See `communicator.Keeper`."""
        for handle in handles:
            handle.drop(comm_id)
        self._registry.release(handles, comm_id)

    async def replace(self, place: Place) -> DeviceHandle:
        """See `communicator.Keeper`."""
        spare = await replace(
            place,
            self._checkpoints.last(place.comm_id),
            self._allocations.of(place.comm_id, place.handle.device_id),
            lambda blocks: self._registry.spare(blocks, place.handle, place.comm_id),
            lambda handle: self.let_go(place.comm_id, [handle]),
        )
        self._allocations.move(place.comm_id, place.handle.device_id, spare.device_id)
        return spare

    async def GetCommStatus(self, request: pb.GetCommStatusRequest, context: Any) -> pb.GetCommStatusResponse:
        comm = self._comm(request.commId)
        status, message = comm.status
        return pb.GetCommStatusResponse(
            status=status,
            message=message,
            epoch=comm.epoch.number,
            devices=[handle.metadata for handle in comm.handles],
            lane=self.lane,
        )

    async def CommFinalize(self, request: pb.CommFinalizeRequest, context: Any) -> pb.CommFinalizeResponse:
        comm = self._comm(request.commId)
        await comm.finalize()
        self._journal.change_communicator(comm.comm_id, finalized=True)
        return pb.CommFinalizeResponse(status=comm.status[0])

    async def CommDestroy(self, request: pb.CommDestroyRequest, context: Any) -> pb.CommDestroyResponse:
        await self._destroy(self._comm(request.commId))
        return pb.CommDestroyResponse()

    async def _destroy(self, comm: Communicator) -> None:
        await comm.finalize()
        self._checkpoints.forget(comm.comm_id)
        if self._comms.pop(comm.comm_id, None) is not None:  # otherwise another call was faster
            await asyncio.shield(self._give_back(comm))

    async def _give_back(self, comm: Communicator) -> None:
        try:
            await comm.leave()
        finally:
            self._registry.release(comm.handles, comm.comm_id)
            self._allocations.forget(comm.comm_id)
            self._commits.forget(comm.comm_id)
            forget()
            # Last: until then a client's second try finds it, and its memory is not left behind.
            self._journal.forget_communicator(comm.comm_id)

    async def ListDevices(self, request: pb.ListDevicesRequest, context: Any) -> pb.ListDevicesResponse:
        await self._registry.refresh()
        return pb.ListDevicesResponse(
            devices=[
                pb.DeviceStatus(
                    metadata=handle.metadata,
                    reachable=handle.reachable,
                    commIds=sorted(handle.comm_ids),
                    embedded=handle.embedded,
                )
                for handle in self._registry.handles
            ]
        )

    async def RegisterDevices(
        self, request: pb.RegisterDevicesRequest, context: Any
    ) -> AsyncGenerator[pb.RegisterDevicesResponse, None]:
        if not request.address:
            raise InvalidValue("address is empty, expected host:port")
        stops = asyncio.ensure_future(self._stops.wait())
        try:
            while not stops.done():
                server = await self._registry.register(request.address)
                self._journal.put_server(KnownServer(server.address, registered=True))
                yield pb.RegisterDevicesResponse(deviceIds=[handle.device_id for handle in server.handles])
                # Said again and again: the server is to notice when this end is gone without a word.
                await asyncio.wait([stops], timeout=_REPEAT_REGISTRATION_S)
        finally:
            stops.cancel()

    def end_registrations(self) -> None:
        """The coordinator stops: the registered servers are to look for the next one."""
        self._stops.set()

    async def UnregisterDevices(self, request: pb.UnregisterDevicesRequest, context: Any) -> pb.UnregisterDevicesResponse:
        await self._registry.unregister(request.address, self._retire)
        self._journal.forget_server(request.address)
        return pb.UnregisterDevicesResponse()

    async def _retire(self, handle: DeviceHandle) -> None:
        """Returns when a device's communicators have ended what they run, and go on without it."""
        for comm in [self._comms[comm_id] for comm_id in sorted(handle.comm_ids) if comm_id in self._comms]:
            await comm.retire(handle)

    # ---- collectives --------------------------------------------------------------------------------------------------

    async def GroupStart(self, request: pb.GroupStartRequest, context: Any) -> pb.GroupStartResponse:
        self._comm(request.commId).group_start()
        return pb.GroupStartResponse(success=True)

    async def GroupEnd(self, request: pb.GroupEndRequest, context: Any) -> pb.GroupEndResponse:
        return await self._once("GroupEnd", request, request.commId, context, lambda: self._group_end(request))

    async def _group_end(self, request: pb.GroupEndRequest) -> pb.GroupEndResponse:
        comm = self._comm(request.commId)
        if request.discard:
            comm.group_discard()
            return pb.GroupEndResponse(success=True)
        wait = not request.nonBlocking
        if request.operations:
            calls = [(self._call(comm, one), one.epoch) for one in request.operations]
            result = await groups.run_group(comm, calls, wait)
        else:
            result = await comm.group_end(wait)
        return pb.GroupEndResponse(success=True, result=result)

    async def AllReduceRing(self, request: pb.AllReduceRingRequest, context: Any) -> pb.AllReduceRingResponse:
        async def run() -> pb.AllReduceRingResponse:
            result = await self._all_reduce("ring", request.commId, request, request.memAddrs)
            return pb.AllReduceRingResponse(success=True, result=result)

        return await self._once("AllReduceRing", request, request.commId, context, run)

    async def NaiveAllReduce(self, request: pb.NaiveAllReduceRequest, context: Any) -> pb.NaiveAllReduceResponse:
        async def run() -> pb.NaiveAllReduceResponse:
            result = await self._all_reduce("naive", request.comm_id, request, request.mem_addrs)
            return pb.NaiveAllReduceResponse(success=True, result=result)

        return await self._once("NaiveAllReduce", request, request.comm_id, context, run)

    async def _all_reduce(self, algorithm: str, comm_id: int, request: Any, addrs: Any) -> pb.CollectiveResult | None:
        comm = self._comm(comm_id)
        call = all_reduce_call(algorithm, comm.nranks_of(request.epoch), request, addrs)
        return await comm.submit(call, request.epoch)

    async def Collective(self, request: pb.CollectiveRequest, context: Any) -> pb.CollectiveResponse:
        async def run() -> pb.CollectiveResponse:
            comm = self._comm(request.commId)
            result = await comm.submit(self._call(comm, request), request.epoch)
            return pb.CollectiveResponse(success=True, result=result)

        if request.checkOnly:
            comm = self._comm(request.commId)
            await comm.check(self._call(comm, request), request.epoch)
            return pb.CollectiveResponse(success=True)
        return await self._once("Collective", request, request.commId, context, run)

    @staticmethod
    def _call(comm: Communicator, request: pb.CollectiveRequest) -> CollectiveCall:
        request.ClearField("idempotencyKey")  # by which no two requests would be the same
        nranks = comm.nranks_of(request.epoch)
        message = request.SerializeToString()
        return _call_of(message, nranks) if len(message) <= _MAX_REMEMBERED_BYTES else call_of(request, nranks)

    async def GetCostModel(self, request: pb.GetCostModelRequest, context: Any) -> pb.GetCostModelResponse:
        return pb.GetCostModelResponse(json=self._chooser.model.to_json())

    async def SetCostModel(self, request: pb.SetCostModelRequest, context: Any) -> pb.SetCostModelResponse:
        try:
            model = CostModel.from_json(request.json)
        except ValueError as error:
            raise InvalidValue(str(error)) from None
        self._chooser.use(model)
        if self._settings.cost_model_file is not None:
            try:
                await asyncio.to_thread(write_whole, self._settings.cost_model_file, model.to_json())
            except OSError as error:
                raise InternalError(f"the cost model is in use, but was not kept: {error}") from error
        return pb.SetCostModelResponse()

    # ---- checkpoints --------------------------------------------------------------------------------------------------

    async def Checkpoint(self, request: pb.CheckpointRequest, context: Any) -> AsyncGenerator[pb.CheckpointProgress, None]:
        comm = self._comm(request.commId)
        _drop_lost(comm, request)
        async with aclosing(self._checkpoints.save(comm, request)) as answers:
            async for answer in answers:
                last = self._checkpoints.last(comm.comm_id)
                if answer.complete and last is not None:
                    self._journal.change_communicator(comm.comm_id, checkpoint=(last.url, last.seats))
                yield answer

    async def Restore(self, request: pb.RestoreRequest, context: Any) -> pb.RestoreResponse:
        comm = self._comm(request.commId)
        _drop_lost(comm, request)
        return await self._checkpoints.restore(comm, request)

    # ---- memory -------------------------------------------------------------------------------------------------------

    async def Memcpy(self, request: pb.MemcpyRequest, context: Any) -> pb.MemcpyResponse:
        if request.HasField("hostToDevice"):
            to_device = request.hostToDevice
            handle = self._device(to_device, "dstDeviceId")
            require(to_device, "dstMemAddr")
            data = to_device.hostSrcData  # each access copies it
            await self._write(handle, to_device.dstMemAddr.value, len(data), pieces(data))
            return pb.MemcpyResponse(hostToDevice=pb.MemcpyHostToDeviceResponse(success=True))
        if request.HasField("deviceToHost"):
            to_host = request.deviceToHost
            handle = self._device(to_host, "srcDeviceId")
            require(to_host, "srcMemAddr")
            handle.check(to_host.srcMemAddr.value, to_host.numBytes)
            if to_host.numBytes >= self._settings.max_message_bytes:
                limit = self._settings.max_message_bytes
                raise MessageTooLarge(
                    f"{to_host.numBytes} bytes do not fit into a message of {limit}; StreamDeviceToHost has no limit"
                )
            response = pb.MemcpyResponse()
            # Assigned, not passed to constructors, each of which would copy it.
            response.deviceToHost.dstData = await self._read_all(handle, to_host.srcMemAddr.value, to_host.numBytes)
            return response
        raise MissingField("MemcpyRequest needs one of hostToDevice and deviceToHost, and has neither")

    async def StreamHostToDevice(self, chunks: AsyncIterator[Chunk], context: Any) -> pb.StreamHostToDeviceResponse:
        first = await anext(chunks, None)
        if first is None or first.header is None:
            raise MissingField("the first chunk of StreamHostToDevice must carry deviceId and memAddr")
        header = first.header
        handle = self._device(header, "deviceId")
        require(header, "memAddr")

        async def all_chunks() -> AsyncIterator[Chunk]:
            yield Chunk(first.data)
            async for chunk in chunks:
                yield chunk

        written = await self._write(handle, header.memAddr.value, header.numBytes, all_chunks())
        return pb.StreamHostToDeviceResponse(numBytes=written)

    async def StreamDeviceToHost(self, request: pb.StreamDeviceToHostRequest, context: Any) -> AsyncGenerator[Chunk, None]:
        handle = self._device(request, "deviceId")
        require(request, "memAddr")
        async with aclosing(self._read(handle, request.memAddr.value, request.numBytes)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def HoldMemory(self, request: pb.HoldMemoryRequest, context: Any) -> AsyncGenerator[pb.SharedMemory, None]:
        handle = self._device(request, "deviceId")
        require(request, "memAddr")
        handle.check(request.memAddr.value, request.numBytes)
        limit_s = self._settings.stall_timeout_s + request.numBytes / _SLOWEST_COPY_BYTES_PER_S
        async with self._turn(handle):
            handle.require_alive()
            await handle.share_memory()
            assert handle.shared is not None
            yield handle.shared
            await asyncio.sleep(limit_s)  # the caller ends it
            if request.writes:
                await handle.share_memory(move=True)
            raise OperationTimeout(f"the caller has held the memory of {handle} for {limit_s:g} s")

    async def _write(self, handle: DeviceHandle, addr: int, nbytes: int, chunks: AsyncIterator[Chunk]) -> int:
        handle.check(addr, nbytes)
        async with self._turn(handle):
            handle.require_alive()
            return await handle.write(addr, nbytes, _checked(handle, addr, nbytes, chunks))

    async def _read(self, handle: DeviceHandle, addr: int, nbytes: int) -> AsyncGenerator[Chunk, None]:
        handle.check(addr, nbytes)
        async with self._turn(handle):
            handle.require_alive()
            async with aclosing(handle.read(addr, nbytes)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _read_all(self, handle: DeviceHandle, addr: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        filled = 0
        async for chunk in self._read(handle, addr, nbytes):
            piece = memoryview(chunk.data)
            data[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
        return bytes(data)

    def _turn(self, handle: DeviceHandle) -> Turn:
        return Turn([handle], self._settings.operation_timeout_s)

    async def Malloc(self, request: pb.MallocRequest, context: Any) -> pb.MallocResponse:
        async def run() -> pb.MallocResponse:
            handle = self._device(request, "deviceId")
            if request.commId and request.commId not in handle.comm_ids:
                raise CommNotFound(f"{handle} is in no communicator {request.commId}")
            response: pb.MallocResponse = await handle.call("Malloc", request)
            self._allocations.add(request.commId, handle.device_id, response.memAddr.value, request.numBytes)
            return response

        return await self._once("Malloc", request, request.commId, context, run)

    async def Free(self, request: pb.FreeRequest, context: Any) -> pb.FreeResponse:
        async def run() -> pb.FreeResponse:
            handle = self._device(request, "deviceId")
            response: pb.FreeResponse = await handle.call("Free", request)
            self._allocations.remove(request.commId, handle.device_id, request.memAddr.value)
            return response

        return await self._once("Free", request, request.commId, context, run)


@remembered
def _call_of(message: bytes, nranks: int) -> CollectiveCall:
    """See `call_of`."""
    return call_of(pb.CollectiveRequest.FromString(message), nranks)


async def _checked(handle: DeviceHandle, addr: int, announced: int, chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """The chunks, as long as they stay inside the device's memory and are as many bytes as announced (0: any)."""
    total = 0
    async for chunk in chunks:
        total += memoryview(chunk.data).nbytes
        if announced and total > announced:
            raise StreamLength(f"{announced} bytes were announced, {total} came")
        handle.check(addr, total)
        yield chunk
    if announced and total != announced:
        raise StreamLength(f"{announced} bytes were announced, {total} came")


def _check_number(request: pb.CommInitRequest | pb.CommGrowRequest) -> None:
    if request.numDevices == 0:
        raise InvalidValue("numDevices is 0, expected at least 1")
    if request.deviceIds and len(request.deviceIds) != request.numDevices:
        raise InvalidValue(f"numDevices is {request.numDevices}, but {len(request.deviceIds)} deviceIds are named")


def _drop_lost(comm: Communicator, request: pb.CheckpointRequest | pb.RestoreRequest) -> None:
    """Leaves out the parts of ranks that are lost, so that the others are numbered as they are now."""
    kept, nranks = comm.kept(request.epoch), comm.nranks_of(request.epoch)
    for array in request.arrays:
        if len(array.parts) == nranks > len(kept):
            parts = [array.parts[rank] for rank in kept]
            del array.parts[:]
            array.parts.extend(parts)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file: whoever reads it finds the old text or the new one. Raises OSError."""
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _new_comm_id() -> int:
    """Drawn at random, so that coordinators that share devices do not collide; below 2**53, for JavaScript's numbers."""
    return secrets.randbelow((1 << 53) - 1) + 1
