"""The coordinator's side of one device, in its own process or behind a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import grpc
import numpy as np

from dsml_gpu.errors import (
    DeviceNotFound,
    DsmlError,
    MessageTooLarge,
    NoAnswer,
    OperationAborted,
    OperationTimeout,
    PeerUnavailable,
    Unavailable,
)
from dsml_gpu.memory.arena import OpenedArena, check_range
from dsml_gpu.memory.shared import SharedHandle, open_shared
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.lane import Lane, open_lane
from dsml_gpu.wire.outgoing import OutgoingStream
from dsml_gpu.wire.status import error_of
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES
from dsml_gpu.wire.timeouts import in_time

#: For control messages that do no work.
CONTROL_TIMEOUT_S = 5.0
#: To move all of a device's memory.
_MOVE_TIMEOUT_S = 120.0


class DeviceConnection(Protocol):
    """How a coordinator reaches the service of a device. All methods raise `DsmlError`.

    Attributes:
        lane: a short cut that is, or was, open; None: there is none.
    """

    lane: Lane | None

    @property
    def tells_of_its_end(self) -> bool:
        """Whether this would be False if the device's process had died."""

    async def open_lane(self, name: str) -> None:
        """Goes by a lane of that name from now on, where it can (`wire.lane`)."""

    def close(self) -> None:
        """Closes the lane. Idempotent."""

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        """One unary RPC of GPUDevice."""

    async def write(self, chunks: AsyncIterator[Chunk]) -> pb.StreamHostToDeviceResponse:
        """StreamHostToDevice; an exception of `chunks` ends it and is raised."""

    def read(self, request: pb.StreamDeviceToHostRequest) -> AsyncGenerator[Chunk, None]:
        """StreamDeviceToHost."""


class RemoteConnection:
    """To a device server, by gRPC.

    Args:
        stall_timeout_s: a copy fails when the device neither takes nor gives anything for so long.
    """

    def __init__(self, stub: Any, stall_timeout_s: float) -> None:
        self._stub = stub
        self._stall_timeout_s = stall_timeout_s
        self.lane: Lane | None = None
        self._lane_name = ""

    @property
    def tells_of_its_end(self) -> bool:
        return self.lane is not None and self.lane.is_open

    async def open_lane(self, name: str) -> None:
        if name == self._lane_name and (self.lane is None or self.lane.is_open):
            return  # it is open, or cannot be opened from here
        self.close()
        self._lane_name = name
        lane = await open_lane(name)
        if lane is not None and self.tells_of_its_end:  # another call was faster
            lane.close()
        else:
            self.lane = lane

    def close(self) -> None:
        if self.lane is not None:
            self.lane.close()

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        if self.lane is not None and self.lane.is_open:
            with suppress(MessageTooLarge):  # then by gRPC, which takes more
                return await self.lane.call(method, request, timeout_s)
        try:
            return await getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    async def write(self, chunks: AsyncIterator[Chunk]) -> pb.StreamHostToDeviceResponse:
        stream = OutgoingStream(self._stub.StreamHostToDevice())
        try:
            async for chunk in chunks:
                await self._in_time(stream.write(chunk))
            await stream.end()
            response: pb.StreamHostToDeviceResponse = await self._in_time(stream.response())
        except BaseException:
            stream.cancel()
            raise
        return response

    async def read(self, request: pb.StreamDeviceToHostRequest) -> AsyncGenerator[Chunk, None]:
        call = self._stub.StreamDeviceToHost(request)
        try:
            while (chunk := await self._in_time(call.read())) is not grpc.aio.EOF:
                yield chunk
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        finally:
            call.cancel()

    async def _in_time(self, step: Awaitable[Any]) -> Any:
        try:
            return await in_time(step, self._stall_timeout_s, "the device")
        except OperationTimeout as error:
            raise NoAnswer(str(error)) from None


class DeviceHandle:
    """One device as the coordinator sees it.

    Args:
        connection: to its service.
        address: host:port of its server.
        embedded: it lives in this process.
        permanent: it stays when no communicator uses it.
    """

    def __init__(self, connection: DeviceConnection, address: str, embedded: bool = False, permanent: bool = True) -> None:
        self._connection = connection
        self.address = address
        self.embedded = embedded
        self.permanent = permanent
        self.reachable = False
        self.metadata = pb.DeviceMetadata(address=address)
        #: Where others open its memory, as it last said; None: not at all.
        self.shared: pb.SharedMemory | None = None
        #: Its memory as this process has it open, what it was opened with, and the lane that would tell of its end.
        self._opened: OpenedArena | None = None
        self._opened_handle: pb.SharedMemory | None = None
        self._opened_by: Lane | None = None
        self.comm_ids: set[int] = set()
        self.last_work: asyncio.Future[None] | None = None
        self._unheard_leaves: set[int] = set()
        self._ended = False

    @property
    def device_id(self) -> int:
        """0 until the device has answered once."""
        return self.metadata.deviceId.value

    def __str__(self) -> str:
        return f"device {self.device_id or '?'} at {self.address}"

    @property
    def tells_of_its_end(self) -> bool:
        """Whether this would be False if its process had died."""
        return self._connection.tells_of_its_end

    def update(self, metadata: pb.DeviceMetadata) -> None:
        """Takes what the device's server says of it, which has just answered."""
        self.metadata.CopyFrom(metadata)
        # The address that others reach it by is the one that reached it, not what it believes of itself.
        self.metadata.address = self.address
        self.reachable = True

    async def retry_leaves(self) -> None:
        """Tells the device of the ends of communicators that it did not hear."""
        for comm_id in sorted(self._unheard_leaves):
            await self.leave(comm_id)

    async def leave(self, comm_id: int) -> None:
        """Tells the device that a communicator is over; one that does not hear it is told again when it answers next."""
        self._unheard_leaves.add(comm_id)
        await self.call("LeaveComm", pb.LeaveCommRequest(commId=comm_id, deviceId=self.device_id))
        self._unheard_leaves.discard(comm_id)

    async def share_memory(self, *, move: bool = False) -> None:
        """Asks where its memory can be opened, which `shared` says from then on.

        Args:
            move: it is to be somewhere else first, where nobody has it open.

        Raises:
            PeerUnavailable, OperationTimeout: it does not answer.
            DsmlError: its memory cannot be opened.
        """
        request = pb.ShareMemoryRequest(deviceId=self.device_id, move=move)
        try:
            self.shared = await self.call("ShareMemory", request, _MOVE_TIMEOUT_S if move else CONTROL_TIMEOUT_S)
        except DsmlError:
            self.shared = None
            raise

    def end(self) -> None:
        """The device is no more."""
        self._ended = True

    def require_alive(self) -> None:
        """Raises DeviceNotFound where the device is no more: the communicator that it was made for has ended."""
        if self._ended:
            raise DeviceNotFound(f"{self} has ended with its communicator")

    async def call(self, method: str, request: Any, timeout_s: float | None = CONTROL_TIMEOUT_S) -> Any:
        """One RPC to the device.

        Args:
            timeout_s: deadline; None where the caller has its own.

        Raises:
            PeerUnavailable: there is no connection to it, or it broke.
            OperationTimeout: it did not answer in time.
            DsmlError: what the device refused with.
        """
        with self._named_errors():
            return await self._connection.call(method, request, timeout_s)

    async def write(self, addr: int, nbytes: int, chunks: AsyncIterator[Chunk]) -> int:
        """Host to device: `chunks` are written one behind the other from `addr` on. Returns the bytes written.

        Args:
            nbytes: bytes that will come; 0 where that is not known.
        """
        header = pb.DataChunk(deviceId=self.metadata.deviceId, memAddr=pb.MemAddr(value=addr), numBytes=nbytes)

        async def with_header() -> AsyncIterator[Chunk]:
            yield Chunk(b"", header)
            async for chunk in chunks:
                yield chunk

        memory = await self._open_memory()
        if memory is not None:
            written = 0
            async for chunk in chunks:
                data = np.frombuffer(chunk.data, np.uint8)
                memory.view(addr + written, data.size)[...] = data
                written += data.size
            self._require_connected()
            return written
        try:
            with self._named_errors():
                return int((await self._connection.write(with_header())).numBytes)
        except OperationAborted as error:
            # The stream's end may have hidden why it ended: a device that is gone says nothing any more.
            await self.call("GetDeviceMetadata", pb.GetDeviceMetadataRequest(deviceId=self.device_id))
            raise OperationAborted(f"{self}: {error}") from None

    async def read(self, addr: int, nbytes: int) -> AsyncGenerator[Chunk, None]:
        """Device to host, in pieces, each valid until the next one is asked for."""
        memory = await self._open_memory()
        if memory is not None:
            for start in range(addr, addr + nbytes, COPY_SLICE_BYTES):
                yield Chunk(memory.view(start, min(COPY_SLICE_BYTES, addr + nbytes - start)))
            self._require_connected()
            return
        request = pb.StreamDeviceToHostRequest(
            deviceId=self.metadata.deviceId, memAddr=pb.MemAddr(value=addr), numBytes=nbytes
        )
        with self._named_errors():
            async for chunk in self._connection.read(request):
                yield chunk

    async def _open_memory(self) -> OpenedArena | None:
        """The device's memory where this process has it open; None where it cannot."""
        lane = self._connection.lane
        # Without a lane nobody would tell that the device has died, whose memory lives on as long as somebody has it open.
        if lane is None or not lane.is_open or self.metadata.backend != "numpy":
            return None
        if self._opened_by is not lane or (self._opened is not None and self._opened_handle != self.shared):
            self._opened_by, self._opened = lane, None
            with suppress(DsmlError):  # then copies go by gRPC
                await self.share_memory()
                assert self.shared is not None
                array = open_shared(SharedHandle.of_message(self.shared))
                self._opened, self._opened_handle = OpenedArena(array, self.shared.minMemAddr.value), self.shared
        return self._opened

    def _require_connected(self) -> None:
        if not self.tells_of_its_end:
            self.reachable = False
            raise PeerUnavailable(f"{self} is gone")

    def check(self, addr: int, nbytes: int) -> None:
        """Raises AddressOutOfRange unless the range lies in the device's memory."""
        check_range(addr, nbytes, self.metadata.minMemAddr.value, self.metadata.maxMemAddr.value)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Connection errors say which device they are about, and so does that its server no longer has it."""
        try:
            yield
        except DsmlError as error:
            lost = lost_connection(str(self), error)
            if isinstance(error, DeviceNotFound) and not self.embedded:
                lost = PeerUnavailable(f"{self} is gone, its server was restarted without it: {error}")
            if lost is None:
                raise
            self.reachable = False
            raise lost from None


def lost_connection(who: str, error: DsmlError) -> DsmlError | None:
    """The error of a call that nobody answered, saying whom it was for; None where `error` is an answer."""
    if isinstance(error, PeerUnavailable):  # what a device that answers says of its peer
        return None
    if isinstance(error, Unavailable):
        return PeerUnavailable(f"{who} does not answer: {error}")
    if isinstance(error, NoAnswer):
        return NoAnswer(f"{who} does not answer: {error}")
    return None


def pieces(data: bytes) -> AsyncIterator[Chunk]:
    """Host bytes as the chunks of a streaming copy, without copying them."""

    async def generate() -> AsyncIterator[Chunk]:
        view = memoryview(data)
        for start in range(0, len(view), COPY_SLICE_BYTES):
            yield Chunk(view[start : start + COPY_SLICE_BYTES])

    return generate()
