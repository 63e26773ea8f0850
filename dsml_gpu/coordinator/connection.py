"""How a coordinator reaches a device server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol

import grpc

from dsml_gpu.errors import MessageTooLarge, NoAnswer, OperationTimeout, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.lane import Lane, open_lane
from dsml_gpu.wire.outgoing import OutgoingStream
from dsml_gpu.wire.status import error_of
from dsml_gpu.wire.timeouts import in_time


class DeviceConnection(Protocol):
    """How a coordinator reaches the service of a device. All methods raise `DsmlError`.

    Attributes:
        lane: a short cut that is, or was, open; None: there is none.
        on_lane_end: called when it ends; its other end is then gone, as good as always.
    """

    lane: Lane | None
    on_lane_end: Callable[[], None]

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

    def read(self, request: pb.StreamDeviceToHostRequest, loss: asyncio.Future[str]) -> AsyncGenerator[Chunk, None]:
        """StreamDeviceToHost.

        Args:
            loss: gets the reason when the device is lost, which ends it with Unavailable.
        """

    def stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        """One RPC of GPUDevice that is answered by a stream of messages; without a limit of its own."""


class RemoteConnection:
    """To a device server, by gRPC.

    Args:
        stall_timeout_s: a copy fails when the device neither takes nor gives anything for so long.
    """

    def __init__(self, stub: Any, stall_timeout_s: float) -> None:
        self._stub = stub
        self._stall_timeout_s = stall_timeout_s
        self.lane: Lane | None = None
        self.on_lane_end: Callable[[], None] = lambda: None
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
            if lane is not None:
                lane.on_end = lambda: self.on_lane_end()

    def close(self) -> None:
        if self.lane is not None:
            self.lane.on_end = lambda: None
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

    async def read(self, request: pb.StreamDeviceToHostRequest, loss: asyncio.Future[str]) -> AsyncGenerator[Chunk, None]:
        call = self._stub.StreamDeviceToHost(request)
        loss.add_done_callback(lambda _: call.cancel())
        try:
            while (chunk := await self._in_time(call.read())) is not grpc.aio.EOF:
                yield chunk
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        except asyncio.CancelledError:  # what a call raises that was cancelled here
            if not loss.done():
                raise
            raise Unavailable(loss.result()) from None
        finally:
            call.cancel()

    async def stream(self, method: str, request: Any) -> AsyncGenerator[Any, None]:
        call = getattr(self._stub, method)(request)
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                yield answer
        except grpc.RpcError as failure:
            raise error_of(failure) from None
        finally:
            call.cancel()

    async def _in_time(self, step: Awaitable[Any]) -> Any:
        try:
            return await in_time(step, self._stall_timeout_s, "the device")
        except OperationTimeout as error:
            raise NoAnswer(str(error)) from None
