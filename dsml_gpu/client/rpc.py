"""Calls to a coordinator over a blocking channel, with deadlines and the project's exceptions.

A coordinator that does not answer is tried again for a while. Whether it had got the request nobody knows, so a call that
must not happen twice carries a key, by which the coordinator knows it again (`idempotencyKey`).
"""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import grpc
import numpy as np

from dsml_gpu.client.outages import LONGEST_BACKOFF_S, CoordinatorLost, Outages, Tries
from dsml_gpu.errors import (
    CommNotFound,
    DsmlError,
    MemoryNotShared,
    MessageTooLarge,
    OperationAborted,
    PeerUnavailable,
    StreamLength,
    Unavailable,
)
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.blocking_lane import BlockingLanes, LaneClosed
from dsml_gpu.wire.codec import Chunk
from dsml_gpu.wire.status import error_of, refusal_of
from dsml_gpu.wire.stubs import COPY_SLICE_BYTES, channel_options, coordinator_stub

T = TypeVar("T")

#: Copies up to this size go as one message, larger ones as a stream.
_UNARY_COPY_BYTES = 1 << 20
#: A copy may take the time of a collective and what it needs at this speed.
_SLOWEST_COPY_BYTES_PER_S = 4 << 20
#: Methods that must not happen twice.
_KEYED = frozenset(
    method.name
    for method in pb.DESCRIPTOR.services_by_name["GPUCoordinator"].methods
    if "idempotencyKey" in method.input_type.fields_by_name
)


class CoordinatorConnection:
    """A connection to one coordinator. Thread-safe.

    Args:
        target: host:port.
        timeout_s: deadline of calls that do no long work.
        collective_timeout_s: deadline of collectives.
        reconnect_s: how long a coordinator that does not answer any more is tried again, within a call's deadline.

    Raises:
        PeerUnavailable: nobody answers there within `timeout_s`.
    """

    def __init__(self, target: str, timeout_s: float, collective_timeout_s: float, reconnect_s: float = 0.0) -> None:
        self.target = target
        self._timeout_s = timeout_s
        self.collective_timeout_s = collective_timeout_s
        self._reconnect_s = reconnect_s
        self._outages = Outages(target, reconnect_s)
        self._key_prefix, self._key_numbers = secrets.token_hex(8), itertools.count()
        self._lanes: BlockingLanes | None = None
        self._lane_name, self._lane_comm_id = "", 0
        self._lane_broke = False
        self._closing = threading.Event()
        # gRPC's own first back-off is a second.
        options = [*channel_options(), ("grpc.initial_reconnect_backoff_ms", 100)]
        self._channel = grpc.insecure_channel(target, options=options)
        self._stub = coordinator_stub(self._channel)
        if not self._is_ready(timeout_s):
            self._channel.close()
            raise PeerUnavailable(f"no coordinator answers at {target} within {timeout_s:g} s")

    def call(self, method: str, request: Any, timeout_s: float | None = None) -> Any:
        """One RPC of one message each way, which happens once however often it is tried.

        Raises:
            PeerUnavailable: the coordinator does not answer.
            DsmlError: the exception class of the refusal.
        """
        if method in _KEYED:
            request.idempotencyKey = f"{self._key_prefix}-{next(self._key_numbers):x}"
        return self.until_answered(lambda limit_s: self._call_once(method, request, limit_s), timeout_s or self._timeout_s)

    def until_answered(self, attempt: Callable[[float], T], timeout_s: float) -> T:
        """Makes an attempt, again and again while the coordinator does not answer.

        Args:
            attempt: may happen several times; gets the time that is left to it.
            timeout_s: of all attempts together.

        Raises:
            CoordinatorLost: of the last attempt, after `reconnect_s`.
            DsmlError: what the coordinator answers.
        """
        deadline_s = time.monotonic() + timeout_s
        try:
            answer = attempt(timeout_s)
        except CoordinatorLost as error:
            answer = self._try_again(attempt, deadline_s, error)
        if self._outages.lost:
            self._outages.ends()
        return answer

    def _try_again(self, attempt: Callable[[float], T], deadline_s: float, error: CoordinatorLost) -> T:
        tries = self._new_tries(deadline_s)
        while (wait_s := tries.next_wait_s()) is not None:
            self._outages.begins()
            if self._closing.wait(wait_s) or not self._is_ready_by(tries.until_s):
                break
            started_s = time.monotonic()
            try:
                return attempt(max(0.001, deadline_s - started_s))
            except CoordinatorLost as again:
                error = again
            except CommNotFound as unknown:
                said = (
                    f"{unknown}; the coordinator did not answer for a while, and may have been started anew without --state"
                )
                raise CommNotFound(said) from None
            if time.monotonic() - started_s > LONGEST_BACKOFF_S:  # it was back, and is lost once more
                tries = self._new_tries(deadline_s)
        raise error

    def _new_tries(self, deadline_s: float) -> Tries:
        return Tries(min(deadline_s, time.monotonic() + self._reconnect_s))

    def _is_ready_by(self, until_s: float) -> bool:
        """Whether there is a connection by then."""
        while not self._closing.is_set() and (remaining_s := until_s - time.monotonic()) > 0:
            if self._is_ready(min(remaining_s, LONGEST_BACKOFF_S)):
                return True
        return False

    def _is_ready(self, timeout_s: float) -> bool:
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError:
            ready.cancel()
            return False
        return True

    def _call_once(self, method: str, request: Any, timeout_s: float) -> Any:
        if self._lanes is not None:
            with suppress(LaneClosed, MessageTooLarge):  # then it goes by gRPC
                return self._call_by_lane(self._lanes, method, request, timeout_s)
        try:
            answer = getattr(self._stub, method)(request, timeout=timeout_s)
        except grpc.RpcError as failure:
            raise self._error(failure) from None
        if self._lane_broke:
            self._find_lane()
        return answer

    def open_lane(self, name: str, comm_id: int) -> None:
        """Calls go by the coordinator's lane of that name from now on, where it can be reached from here (`wire.lane`).

        Args:
            comm_id: a communicator, by which the coordinator can be asked for its lane when it was restarted.
        """
        self._lane_comm_id = comm_id
        if name and name != self._lane_name:
            self._lane_name = name
            self._lanes = BlockingLanes(name, "GPUCoordinator")

    def _call_by_lane(self, lanes: BlockingLanes, method: str, request: Any, timeout_s: float) -> Any:
        try:
            return lanes.call(method, request, timeout_s)
        except LaneClosed:
            self._drop_lane(lanes)
            raise
        except Unavailable as error:
            if type(error) is not Unavailable:
                raise
            self._drop_lane(lanes)
            raise self._named(error) from None

    def _drop_lane(self, lanes: BlockingLanes) -> None:
        lanes.close()
        if self._lanes is lanes:
            self._lanes, self._lane_broke = None, True

    def _find_lane(self) -> None:
        """Opens the lane of a coordinator that was restarted. One that has the same as before cannot be reached by it."""
        self._lane_broke = False
        request = pb.GetCommStatusRequest(commId=self._lane_comm_id)
        with suppress(grpc.RpcError):  # the communicator has ended, and the next one's answer says it
            self.open_lane(self._stub.GetCommStatus(request, timeout=self._timeout_s).lane, self._lane_comm_id)

    def write(self, device_id: int, addr: int, data: np.ndarray) -> None:
        """Copies contiguous host bytes (a uint8 array) to device memory."""
        device, address = pb.DeviceId(value=device_id), pb.MemAddr(value=addr)
        if data.nbytes <= _UNARY_COPY_BYTES:
            to_device = pb.MemcpyHostToDeviceRequest(hostSrcData=data.tobytes(), dstDeviceId=device, dstMemAddr=address)
            self.call("Memcpy", pb.MemcpyRequest(hostToDevice=to_device), self.copy_timeout_s(data.nbytes))
            return
        header = pb.DataChunk(deviceId=device, memAddr=address, numBytes=data.nbytes)

        def chunks() -> Iterator[Chunk]:
            yield Chunk(b"", header)
            for start in range(0, data.nbytes, COPY_SLICE_BYTES):
                yield Chunk(data[start : start + COPY_SLICE_BYTES])

        def attempt(limit_s: float) -> None:
            try:
                self._stub.StreamHostToDevice(chunks(), timeout=limit_s)
            except grpc.RpcError as failure:
                raise self._error(failure) from None

        self.until_answered(attempt, self.copy_timeout_s(data.nbytes))

    def read(self, device_id: int, addr: int, out: np.ndarray) -> None:
        """Copies device memory to contiguous host memory (a uint8 array)."""
        device, address = pb.DeviceId(value=device_id), pb.MemAddr(value=addr)
        if out.nbytes <= _UNARY_COPY_BYTES:
            to_host = pb.MemcpyDeviceToHostRequest(srcDeviceId=device, srcMemAddr=address, numBytes=out.nbytes)
            response = self.call("Memcpy", pb.MemcpyRequest(deviceToHost=to_host), self.copy_timeout_s(out.nbytes))
            out[:] = np.frombuffer(response.deviceToHost.dstData, dtype=np.uint8)
            return
        request = pb.StreamDeviceToHostRequest(deviceId=device, memAddr=address, numBytes=out.nbytes)

        def attempt(limit_s: float) -> int:
            filled = 0
            try:
                for chunk in self._stub.StreamDeviceToHost(request, timeout=limit_s):
                    piece = np.frombuffer(chunk.data, dtype=np.uint8)
                    out[filled : filled + piece.size] = piece
                    filled += piece.size
            except grpc.RpcError as failure:
                raise self._error(failure) from None
            return filled

        filled = self.until_answered(attempt, self.copy_timeout_s(out.nbytes))
        if filled != out.nbytes:
            raise StreamLength(f"expected {out.nbytes} bytes of device memory, got {filled}")

    def stream(self, method: str, request: Any, timeout_s: float) -> Answers:
        """One RPC that is answered by a stream of messages. It is not tried again."""
        return Answers(getattr(self._stub, method)(request, timeout=timeout_s), self._error)

    @contextmanager
    def hold(self, request: pb.HoldMemoryRequest, timeout_s: float | None = None) -> Iterator[pb.SharedMemory]:
        """Holds a device's memory while the block runs; gives where it can be opened.

        Raises:
            CoordinatorLost: it does not answer (any more), and what the block wrote may be lost.
            MemoryNotShared: it cannot.
            OperationTimeout: earlier work did not end, or the block took too long, and what it wrote may be lost.
        """
        call = self._stub.HoldMemory(request, timeout=timeout_s or self.copy_timeout_s(request.numBytes))
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
        """Closes the connection; calls under way are not tried again. Idempotent."""
        self._closing.set()
        self._channel.close()
        if self._lanes is not None:
            self._lanes.close()

    def copy_timeout_s(self, nbytes: int) -> float:
        """Deadline of a copy, which comes after the collectives that were issued before it."""
        return self.collective_timeout_s + nbytes / _SLOWEST_COPY_BYTES_PER_S

    def _error(self, failure: grpc.RpcError) -> DsmlError:
        if failure.code() is grpc.StatusCode.CANCELLED and refusal_of(failure) is None:
            # Nobody here has cancelled it: the coordinator has, as it stops.
            return self._named(Unavailable(failure.details()))
        return self._named(error_of(failure))

    def _named(self, error: DsmlError) -> DsmlError:
        if type(error) is Unavailable:
            return CoordinatorLost(f"the coordinator at {self.target} does not answer: {error}")
        return error


class Answers:
    """The messages that answer one RPC. Errors of the call are raised where the next one is asked for.

    Args:
        call: of a blocking stub.
        error_of_failure: the exception of a failure.
    """

    def __init__(self, call: Any, error_of_failure: Callable[[grpc.RpcError], DsmlError]) -> None:
        self._call = call
        self._error = error_of_failure
        self._cancelled = False

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._call
        except grpc.RpcError as failure:
            if self._cancelled:
                raise OperationAborted("cancelled by the caller") from None
            raise self._error(failure) from None

    def cancel(self) -> None:
        """Ends the call. Idempotent, and without effect on one that has ended."""
        self._cancelled = True
        self._call.cancel()
