"""The coordinator's side of one device, in its own process or behind a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import grpc

from dsml_gpu.errors import NoAnswer, OperationTimeout, PeerUnavailable, Unavailable
from dsml_gpu.memory.arena import check_range
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.outgoing import OutgoingStream
from dsml_gpu.wire.status import error_of
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES
from dsml_gpu.wire.timeouts import in_time

#: For control messages that do no work.
CONTROL_TIMEOUT_S = 5.0


class DeviceConnection(Protocol):
    """How a coordinator reaches the service of a device. All methods raise `DsmlError`."""

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        """One unary RPC of GPUDevice."""

    async def write(self, chunks: AsyncIterator[Chunk]) -> pb.StreamHostToDeviceResponse:
        """StreamHostToDevice; an exception of `chunks` ends it and is raised."""

    def read(self, request: pb.StreamDeviceToHostRequest) -> AsyncIterator[Chunk]:
        """StreamDeviceToHost."""


class RemoteConnection:
    """To a device server, by gRPC.

    Args:
        stall_timeout_s: a copy fails when the device neither takes nor gives anything for so long.
    """

    def __init__(self, stub: Any, stall_timeout_s: float) -> None:
        self._stub = stub
        self._stall_timeout_s = stall_timeout_s

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
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

    async def read(self, request: pb.StreamDeviceToHostRequest) -> AsyncIterator[Chunk]:
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
        self.comm_ids: set[int] = set()
        self._last_work: asyncio.Future[None] | None = None

    @property
    def device_id(self) -> int:
        """0 until the device has answered once."""
        return self.metadata.deviceId.value

    def __str__(self) -> str:
        return f"device {self.device_id or '?'} at {self.address}"

    async def refresh(self) -> None:
        """Asks the device who it is. Raises PeerUnavailable where it does not answer."""
        self.reachable = False
        response = await self.call("GetDeviceMetadata", pb.GetDeviceMetadataRequest())
        self.metadata.CopyFrom(response.metadata)
        # The address that others reach it by is the one that reached it, not what it believes of itself.
        self.metadata.address = self.address
        self.reachable = True

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

        with self._named_errors():
            return int((await self._connection.write(with_header())).numBytes)

    async def read(self, addr: int, nbytes: int) -> AsyncIterator[Chunk]:
        """Device to host, in pieces."""
        request = pb.StreamDeviceToHostRequest(
            deviceId=self.metadata.deviceId, memAddr=pb.MemAddr(value=addr), numBytes=nbytes
        )
        with self._named_errors():
            async for chunk in self._connection.read(request):
                yield chunk

    def check(self, addr: int, nbytes: int) -> None:
        """Raises AddressOutOfRange unless the range lies in the device's memory."""
        check_range(addr, nbytes, self.metadata.minMemAddr.value, self.metadata.maxMemAddr.value)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Connection errors say which device they are about."""
        try:
            yield
        except Unavailable as error:
            self.reachable = False
            raise PeerUnavailable(f"{self} does not answer: {error}") from None
        except NoAnswer as error:
            raise NoAnswer(f"{self} does not answer: {error}") from None


def pieces(data: bytes) -> AsyncIterator[Chunk]:
    """Host bytes as the chunks of a streaming copy, without copying them."""

    async def generate() -> AsyncIterator[Chunk]:
        view = memoryview(data)
        for start in range(0, len(view), COPY_SLICE_BYTES):
            yield Chunk(view[start : start + COPY_SLICE_BYTES])

    return generate()


@asynccontextmanager
async def in_order(handles: Iterable[DeviceHandle]) -> AsyncIterator[None]:
    """Stream order: the body runs after everything that was issued earlier on any of the devices has ended.

    The place in the order is taken at once, on all devices together, when the context is entered; so two operations on the
    same devices can never wait for each other.
    """
    handles = list(handles)
    earlier = {handle._last_work for handle in handles if handle._last_work is not None and not handle._last_work.done()}
    ended = asyncio.get_running_loop().create_future()
    for handle in handles:
        handle._last_work = ended
    try:
        if earlier:
            # The futures are others' too: `wait` does not cancel them when this task is cancelled.
            await asyncio.wait(earlier)
        yield
    finally:
        _end_after(ended, [work for work in earlier if not work.done()])


def _end_after(ended: asyncio.Future[None], earlier: list[asyncio.Future[None]]) -> None:
    """Ends a turn; one given up while it waited ends with what it waited for, so that nothing overtakes."""
    if not earlier:
        ended.set_result(None)
        return
    remaining = set(earlier)

    def done(work: asyncio.Future[None]) -> None:
        remaining.discard(work)
        if not remaining:
            ended.set_result(None)

    for work in earlier:
        work.add_done_callback(done)
