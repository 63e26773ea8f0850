"""GPUCoordinator: the contract's messages to and from communicators and devices."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from dsml_gpu.coordinator import groups
from dsml_gpu.coordinator.call import CollectiveCall, all_reduce_call, call_of
from dsml_gpu.coordinator.choice import Chooser
from dsml_gpu.coordinator.communicator import Communicator
from dsml_gpu.coordinator.communicators import Communicators, grown
from dsml_gpu.coordinator.copies import Copies
from dsml_gpu.coordinator.device_handle import DeviceHandle, pieces
from dsml_gpu.coordinator.journal import Journal
from dsml_gpu.coordinator.outcomes import Asked, Outcomes
from dsml_gpu.coordinator.records import KnownServer
from dsml_gpu.coordinator.registry import DeviceRegistry
from dsml_gpu.coordinator.remembered import remembered
from dsml_gpu.coordinator.settings import CoordinatorSettings
from dsml_gpu.errors import CommNotFound, InternalError, InvalidValue, MessageTooLarge, MissingField
from dsml_gpu.schedules.cost_model import CostModel
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.chunk_streams import with_header
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.messages import require

M = TypeVar("M")

#: Requests that are longer are not remembered.
_MAX_REMEMBERED_BYTES = 16 << 10
#: How often a server that has registered hears that it is.
_REPEAT_REGISTRATION_S = 5.0


class CoordinatorService:
    """Servicer of GPUCoordinator.

    Args:
        journal: gets what must not be forgotten; what is in it is still known (`resume`).
    """

    def __init__(self, registry: DeviceRegistry, settings: CoordinatorSettings, journal: Journal) -> None:
        self._registry = registry
        self._settings = settings
        self._journal = journal
        recovered = journal.load()
        self._outcomes = Outcomes(journal, recovered.outcomes)
        self._chooser = Chooser(settings.cost_model)
        self._comms = Communicators(registry, settings, journal, recovered, self._outcomes, self._chooser)
        self._copies = Copies(settings.stall_timeout_s, settings.operation_timeout_s)
        #: Name of the server's lane; empty where it has none.
        self.lane = ""
        self._stops = asyncio.Event()

    async def resume(self) -> None:
        """Goes on with the communicators of the coordinator before. To be called once, before anything is served."""
        await self._comms.resume()

    async def close(self, drain_s: float) -> None:
        """Waits for running collectives, cancels what is not done after `drain_s`, and takes leave of devices.

        Communicators that a next coordinator can go on with stay: their devices hear nothing.
        """
        await self._comms.drain(drain_s)
        await self._outcomes.close()
        await self._comms.close()

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
        created: list[Communicator] = []

        async def run() -> pb.CommInitResponse:
            comm = await self._comm_init(request)
            created.append(comm)
            devices = [handle.metadata for handle in comm.handles]
            return pb.CommInitResponse(success=True, commId=comm.comm_id, devices=devices, lane=self.lane)

        def keep(answer: pb.CommInitResponse) -> None:
            self._comms.record(answer.commId, *self._choices(request))

        try:
            return await self._once("CommInit", request, 0, context, run, keep)
        except InternalError:
            for comm in created:  # which could not be recorded, and nobody will know of
                await asyncio.shield(self._comms.destroy(comm))
            raise

    async def _comm_init(self, request: pb.CommInitRequest) -> Communicator:
        _check_number(request)
        if request.transport not in pb.Transport.values():
            raise InvalidValue(f"unknown transport {request.transport}; known: {', '.join(pb.Transport.keys())}")
        if request.onFailure not in pb.OnFailure.values():
            raise InvalidValue(f"unknown onFailure {request.onFailure}; known: {', '.join(pb.OnFailure.keys())}")
        return await self._comms.create(request.numDevices, request.deviceIds, *self._choices(request))

    def _choices(self, request: pb.CommInitRequest) -> tuple[int, int]:
        """Numbers of the transport and of ``enum OnFailure`` of a communicator."""
        return request.transport or self._settings.transport, request.onFailure or self._settings.on_failure

    async def CommGrow(self, request: pb.CommGrowRequest, context: Any) -> pb.CommGrowResponse:
        return await self._once("CommGrow", request, request.commId, context, lambda: self._comm_grow(request))

    async def _comm_grow(self, request: pb.CommGrowRequest) -> pb.CommGrowResponse:
        comm = self._comms.get(request.commId)
        _check_number(request)
        await self._comms.grow(comm, request.numDevices, request.deviceIds)
        return grown(comm.epoch, comm.handles)

    async def GetCommStatus(self, request: pb.GetCommStatusRequest, context: Any) -> pb.GetCommStatusResponse:
        comm = self._comms.get(request.commId)
        status, message = comm.status
        return pb.GetCommStatusResponse(
            status=status,
            message=message,
            epoch=comm.epoch.number,
            devices=[handle.metadata for handle in comm.handles],
            lane=self.lane,
            seats=comm.epoch.seats,
        )

    async def CommFinalize(self, request: pb.CommFinalizeRequest, context: Any) -> pb.CommFinalizeResponse:
        comm = self._comms.get(request.commId)
        await self._comms.finalize(comm)
        return pb.CommFinalizeResponse(status=comm.status[0])

    async def CommDestroy(self, request: pb.CommDestroyRequest, context: Any) -> pb.CommDestroyResponse:
        await self._comms.destroy(self._comms.get(request.commId))
        return pb.CommDestroyResponse()

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
        await self._registry.unregister(request.address, self._comms.retire)
        self._journal.forget_server(request.address)
        return pb.UnregisterDevicesResponse()

    # ---- collectives --------------------------------------------------------------------------------------------------

    async def GroupStart(self, request: pb.GroupStartRequest, context: Any) -> pb.GroupStartResponse:
        self._comms.get(request.commId).group_start()
        return pb.GroupStartResponse(success=True)

    async def GroupEnd(self, request: pb.GroupEndRequest, context: Any) -> pb.GroupEndResponse:
        return await self._once("GroupEnd", request, request.commId, context, lambda: self._group_end(request))

    async def _group_end(self, request: pb.GroupEndRequest) -> pb.GroupEndResponse:
        comm = self._comms.get(request.commId)
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
        comm = self._comms.get(comm_id)
        call = all_reduce_call(algorithm, comm.nranks_of(request.epoch), request, addrs)
        return await comm.submit(call, request.epoch)

    async def Collective(self, request: pb.CollectiveRequest, context: Any) -> pb.CollectiveResponse:
        async def run() -> pb.CollectiveResponse:
            comm = self._comms.get(request.commId)
            result = await comm.submit(self._call(comm, request), request.epoch)
            return pb.CollectiveResponse(success=True, result=result)

        if request.checkOnly:
            comm = self._comms.get(request.commId)
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
        comm = self._comms.get(request.commId)
        _drop_lost(comm, request)
        async with aclosing(self._comms.checkpoints.save(comm, request)) as answers:
            async for answer in answers:
                last = self._comms.checkpoints.last(comm.comm_id)
                if answer.complete and last is not None:
                    self._journal.change_communicator(comm.comm_id, checkpoint=(last.url, last.seats))
                yield answer

    async def Restore(self, request: pb.RestoreRequest, context: Any) -> pb.RestoreResponse:
        comm = self._comms.get(request.commId)
        _drop_lost(comm, request)
        return await self._comms.checkpoints.restore(comm, request)

    # ---- memory -------------------------------------------------------------------------------------------------------

    async def Memcpy(self, request: pb.MemcpyRequest, context: Any) -> pb.MemcpyResponse:
        if request.HasField("hostToDevice"):
            to_device = request.hostToDevice
            handle = self._device(to_device, "dstDeviceId")
            require(to_device, "dstMemAddr")
            data = to_device.hostSrcData  # each access copies it
            await self._copies.write(handle, to_device.dstMemAddr.value, len(data), pieces(data))
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
            response.deviceToHost.dstData = await self._copies.read_all(handle, to_host.srcMemAddr.value, to_host.numBytes)
            return response
        raise MissingField("MemcpyRequest needs one of hostToDevice and deviceToHost, and has neither")

    async def StreamHostToDevice(self, chunks: AsyncIterator[Chunk], context: Any) -> pb.StreamHostToDeviceResponse:
        header, all_chunks = await with_header(chunks)
        handle = self._device(header, "deviceId")
        require(header, "memAddr")
        written = await self._copies.write(handle, header.memAddr.value, header.numBytes, all_chunks)
        return pb.StreamHostToDeviceResponse(numBytes=written)

    async def StreamDeviceToHost(self, request: pb.StreamDeviceToHostRequest, context: Any) -> AsyncGenerator[Chunk, None]:
        handle = self._device(request, "deviceId")
        require(request, "memAddr")
        async with aclosing(self._copies.read(handle, request.memAddr.value, request.numBytes)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def HoldMemory(self, request: pb.HoldMemoryRequest, context: Any) -> AsyncGenerator[pb.SharedMemory, None]:
        handle = self._device(request, "deviceId")
        require(request, "memAddr")
        addr, nbytes = request.memAddr.value, request.numBytes
        async with aclosing(self._copies.hold(handle, addr, nbytes, request.writes)) as places:
            async for place in places:
                yield place

    async def Malloc(self, request: pb.MallocRequest, context: Any) -> pb.MallocResponse:
        async def run() -> pb.MallocResponse:
            handle = self._device(request, "deviceId")
            if request.commId and request.commId not in handle.comm_ids:
                raise CommNotFound(f"{handle} is in no communicator {request.commId}")
            response: pb.MallocResponse = await handle.call("Malloc", request)
            self._comms.allocations.add(request.commId, handle.device_id, response.memAddr.value, request.numBytes)
            return response

        return await self._once("Malloc", request, request.commId, context, run)

    async def Free(self, request: pb.FreeRequest, context: Any) -> pb.FreeResponse:
        async def run() -> pb.FreeResponse:
            handle = self._device(request, "deviceId")
            response: pb.FreeResponse = await handle.call("Free", request)
            self._comms.allocations.remove(request.commId, handle.device_id, request.memAddr.value)
            return response

        return await self._once("Free", request, request.commId, context, run)


@remembered
def _call_of(message: bytes, nranks: int) -> CollectiveCall:
    """See `call_of`."""
    return call_of(pb.CollectiveRequest.FromString(message), nranks)


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
