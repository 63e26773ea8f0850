"""Calls to a coordinator over a blocking channel, with deadlines and the project's exceptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import numpy as np

from dsml_gpu.errors import DsmlError, MemoryNotShared, MessageTooLarge, PeerUnavailable, StreamLength, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.blocking_lane import BlockingLanes, LaneClosed
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.status import error_of
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES, channel_options, coordinator_stub

#: Copies up to this size go as one message, larger ones as a stream.
_UNARY_COPY_BYTES = 1 << 20
#: A copy may take the time of a collective and what it needs at this speed.
_SLOWEST_COPY_BYTES_PER_S = 4 << 20


class CoordinatorConnection:
    """A connection to one coordinator. Thread-safe.

    Args:
        target: host:port.
        timeout_s: deadline of calls that do no long work.
        collective_timeout_s: deadline of collectives.

    Raises:
        PeerUnavailable: nobody answers there within `timeout_s`.
    """

    def __init__(self, target: str, timeout_s: float, collective_timeout_s: float) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self.collective_timeout_s = collective_timeout_s
        self._lanes: BlockingLanes | None = None
        self._channel = grpc.insecure_channel(target, options=channel_options())
        self._stub = coordinator_stub(self._channel)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise PeerUnavailable(f"no coordinator answers at {target} within {timeout_s:g} s") from None

    def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """One RPC. Raises the exception class of the refusal."""
        if self._lanes is not None and not isinstance(request, Iterator):
            with suppress(LaneClosed, MessageTooLarge):  # then it goes by gRPC
                return self._call_by_lane(self._lanes, method, request, timeout_s or self._timeout_s)
        try:
            return getattr(self._stub, method)(request, timeout=timeout_s or self._timeout_s)
        except grpc.RpcError as failure:
            raise self._error(failure) from None

    def open_lane(self, name: str) -> None:
        """Calls go by the coordinator's lane of that name from now on, where it can be reached from here (`wire.lane`)."""
        if name and self._lanes is None:
            self._lanes = BlockingLanes(name, "GPUCoordinator")

    def _call_by_lane(self, lanes: BlockingLanes, method: str, request: Any, timeout_s: float) -> Any:
        try:
            return lanes.call(method, request, timeout_s)
        except Unavailable as error:
            raise self._named(error) from None

    def write(self, device_id: int, addr: int, data: np.ndarray) -> None:
        """Copies contiguous host bytes (a uint8 array) to device memory."""
        device, address = pb.DeviceId(value=device_id), pb.MemAddr(value=addr)
        if data.nbytes <= _UNARY_COPY_BYTES:
            to_device = pb.MemcpyHostToDeviceRequest(hostSrcData=data.tobytes(), dstDeviceId=device, dstMemAddr=address)
            self.call("Memcpy", pb.MemcpyRequest(hostToDevice=to_device), self._copy_timeout_s(data.nbytes))
            return
        header = pb.DataChunk(deviceId=device, memAddr=address, numBytes=data.nbytes)

        def chunks() -> Iterator[Chunk]:
            yield Chunk(b"", header)
            for start in range(0, data.nbytes, COPY_SLICE_BYTES):
                yield Chunk(data[start : start + COPY_SLICE_BYTES])

        self.call("StreamHostToDevice", chunks(), self._copy_timeout_s(data.nbytes))

    def read(self, device_id: int, addr: int, out: np.ndarray) -> None:
        """Copies device memory to contiguous host memory (a uint8 array)."""
        device, address = pb.DeviceId(value=device_id), pb.MemAddr(value=addr)
        if out.nbytes <= _UNARY_COPY_BYTES:
            to_host = pb.MemcpyDeviceToHostRequest(srcDeviceId=device, srcMemAddr=address, numBytes=out.nbytes)
            response = self.call("Memcpy", pb.MemcpyRequest(deviceToHost=to_host), self._copy_timeout_s(out.nbytes))
            out[:] = np.frombuffer(response.deviceToHost.dstData, dtype=np.uint8)
            return
        request = pb.StreamDeviceToHostRequest(deviceId=device, memAddr=address, numBytes=out.nbytes)
        filled = 0
        try:
            for chunk in self._stub.StreamDeviceToHost(request, timeout=self._copy_timeout_s(out.nbytes)):
                piece = np.frombuffer(chunk.data, dtype=np.uint8)
                out[filled : filled + piece.size] = piece
                filled += piece.size
        except grpc.RpcError as failure:
            raise self._error(failure) from None
        if filled != out.nbytes:
            raise StreamLength(f"expected {out.nbytes} bytes of device memory, got {filled}")

    @contextmanager
    def hold(self, request: pb.HoldMemoryRequest) -> Iterator[pb.SharedMemory]:
        """Holds a device's memory while the block runs; gives where it can be opened.

        Raises:
            MemoryNotShared: it cannot.
            OperationTimeout: earlier work did not end, or the block took too long, and what it wrote may be lost.
        """
        call = self._stub.HoldMemory(request, timeout=self._copy_timeout_s(request.numBytes))
        try:
            yield next(call)
            if not call.is_active():
                next(call)
        except grpc.RpcError as failure:
            if failure.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise MemoryNotShared("the coordinator is older than copies through shared memory") from None
            raise self._error(failure) from None
        finally:
            call.cancel()

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._channel.close()
        if self._lanes is not None:
            self._lanes.close()

    def _copy_timeout_s(self, nbytes: int) -> float:
        # A copy comes after the collectives that were issued before it.
        return self.collective_timeout_s + nbytes / _SLOWEST_COPY_BYTES_PER_S

    def _error(self, failure: grpc.RpcError) -> DsmlError:
        return self._named(error_of(failure))

    def _named(self, error: DsmlError) -> DsmlError:
        if type(error) is Unavailable:
            return PeerUnavailable(f"the coordinator at {self.target} does not answer: {error}")
        return error
