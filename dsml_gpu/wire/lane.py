"""A short cut for unary RPCs between two processes of one host: frames over a Unix socket, instead of gRPC.

An empty RPC over gRPC takes some 0.4 ms on two cores of a server, most of it processor time of both ends; a frame takes a
fraction of that. A collective over shared memory is little more than its control message, so it pays. Where the socket
cannot be reached, everything goes by gRPC.

The socket is in Linux's abstract namespace: it has no file and ends with its process. Anybody can connect to a name, and
take one that is free, so both ends look whether the other one's process is of the same user. A lane that breaks is how a
coordinator hears at once that a device server has died.

A frame is a header (`HEADER`) and a payload. A request's payload is the length of the method's name in a byte, the name,
and the message; an answer's is the message, or of a refusal its name, its code and the text, with zero bytes in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from dsml_gpu.errors import (
    DsmlError,
    InternalError,
    MalformedMessage,
    MessageTooLarge,
    NoAnswer,
    OperationAborted,
    Unavailable,
    error_from,
)
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: Length of the payload, number of the call, kind of the frame.
HEADER = struct.Struct("<IQB")
REQUEST, ANSWER, REFUSAL, CANCEL = range(4)
#: Frames are control messages; what is longer is no frame of ours.
MAX_PAYLOAD_BYTES = 64 << 20
#: What a call is cancelled with where its lane broke or was closed; the client's own CANCEL says nothing.
CONNECTION_BROKE = "the connection broke"
_METHODS = {
    service.name: {method.name: method for method in service.methods} for service in pb.DESCRIPTOR.services_by_name.values()
}
#: struct ucred: pid, uid and gid.
_CREDENTIALS = struct.Struct("3i")


def can_have_lanes() -> bool:
    """Whether the system has abstract Unix sockets."""
    return sys.platform == "linux"


def credentials_of(connection: Any) -> tuple[int, int]:
    """Process id, as this process sees it (0: not at all), and user id of the other end of a Unix socket."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid


def is_of_this_user(connection: Any) -> bool:
    """Whether the process at the other end of a Unix socket is of the same user; says so in the log where it is not."""
    _, uid = credentials_of(connection)
    if uid != os.getuid():
        log.warning("a lane is refused: the other process is of user %d, not %d", uid, os.getuid())
    return bool(uid == os.getuid())


def request_payload(method: str, request: Any) -> bytes:
    """What a request's frame carries. Raises MessageTooLarge."""
    name = method.encode("ascii")
    payload = b"".join((bytes([len(name)]), name, request.SerializeToString()))
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageTooLarge(f"{len(payload)} bytes do not fit into a frame of {MAX_PAYLOAD_BYTES}")
    return payload


def answer_of(service: str, method: str, payload: bytes) -> Any:
    """The message that an answer's frame carries. Raises InternalError where it is none."""
    output = _METHODS[service][method].output_type.name
    try:
        return getattr(pb, output).FromString(payload)
    except DecodeError as error:
        raise InternalError(f"the answer to {method} is not a {output}: {error}") from None


def refusal_of_frame(payload: bytes) -> DsmlError:
    """The exception that a refusal's frame carries."""
    refusal, code, message = payload.decode("utf-8", "replace").split("\0", 2)
    return error_from(code, message, refusal)


class _Frames(asyncio.Protocol):
    """Takes frames apart.

    Attributes:
        is_ours: the other process is of the same user; nothing that comes from another one counts.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self.is_ours = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.is_ours = is_of_this_user(transport.get_extra_info("socket"))
        if not self.is_ours:
            self.close()

    def data_received(self, data: bytes) -> None:
        if not self.is_ours:
            return
        received = self._received
        received += data
        while len(received) >= HEADER.size:
            length, number, kind = HEADER.unpack_from(received)
            end = HEADER.size + length
            if length > MAX_PAYLOAD_BYTES:
                log.warning("a lane is closed: a frame of %d bytes is announced", length)
                self.close()
                return
            if len(received) < end:
                return
            payload = bytes(received[HEADER.size : end])
            del received[:end]
            self.frame(number, kind, payload)

    def frame(self, number: int, kind: int, payload: bytes) -> None:
        """One frame has come."""
        raise NotImplementedError

    def send(self, number: int, kind: int, payload: bytes) -> None:
        """Sends a frame; into nothing where the lane has broken."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(HEADER.pack(len(payload), number, kind) + payload)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class LaneServer:
    """Serves one service of the contract on lanes.

    Args:
        servicer: as of `service.service_handler`; its methods are called with no context.
        service: its name in the contract.

    Attributes:
        name: what clients connect to; empty before `start`, and where there are no lanes.
    """

    def __init__(self, servicer: Any, service: str = "GPUDevice") -> None:
        self._servicer = servicer
        self._service = service
        self._server: asyncio.Server | None = None
        self._lanes: set[_ServerLane] = set()
        self.name = ""

    async def start(self) -> None:
        """Listens."""
        if not can_have_lanes():
            return
        name = f"dsml-{secrets.token_hex(16)}"
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(
            lambda: _ServerLane(self._servicer, self._service, self._lanes), f"\0{name}"
        )
        self.name = name

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuses new lanes and calls, lets running ones end for `drain_s` seconds, then closes all lanes. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        running: list[asyncio.Task[None]] = []
        for lane in self._lanes:
            lane.stops = True
            running += lane.calls.values()
        if running:
            await asyncio.wait(running, timeout=drain_s)
        for lane in list(self._lanes):
            lane.close()


class _ServerLane(_Frames):
    """One client's lane."""

    def __init__(self, servicer: Any, service: str, lanes: set[_ServerLane]) -> None:
        super().__init__()
        self._servicer = servicer
        self._service = service
        self._lanes = lanes
        #: What runs, by number.
        self.calls: dict[int, asyncio.Task[None]] = {}
        self.stops = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self.is_ours:
            self._lanes.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lanes.discard(self)
        for call in self.calls.values():
            call.cancel(CONNECTION_BROKE)

    def frame(self, number: int, kind: int, payload: bytes) -> None:
        if kind == CANCEL:
            if number in self.calls:
                self.calls[number].cancel()
        elif kind == REQUEST:
            task = asyncio.get_running_loop().create_task(self._serve(number, payload))
            self.calls[number] = task
            task.add_done_callback(lambda _: self.calls.pop(number, None))

    async def _serve(self, number: int, payload: bytes) -> None:
        try:
            self.send(number, ANSWER, (await self._answer(payload)).SerializeToString())
        except DsmlError as error:
            self._refuse(number, error)
        except asyncio.CancelledError:
            # Who has cancelled it may not be the client, who is not to wait for ever.
            self._refuse(number, OperationAborted("the call was cancelled"))
            raise
        except Exception as error:
            log.exception("a request met a defect of the server")
            self._refuse(number, InternalError(f"defect of the server: {type(error).__name__}: {error}"))

    async def _answer(self, payload: bytes) -> Any:
        if self.stops:
            raise Unavailable("the server stops")
        name = payload[1 : 1 + payload[0]].decode("ascii", "replace") if payload else ""
        method = _METHODS[self._service].get(name)
        if method is None or method.client_streaming or method.server_streaming:
            raise MalformedMessage(f"{name!r} is no unary method of {self._service}")
        try:
            request = getattr(pb, method.input_type.name).FromString(payload[1 + payload[0] :])
        except DecodeError as error:
            raise MalformedMessage(f"the request is not a {method.input_type.name}: {error}") from None
        return await getattr(self._servicer, name)(request, None)

    def _refuse(self, number: int, error: DsmlError) -> None:
        self.send(number, REFUSAL, b"\0".join((error.refusal.encode(), error.code.encode(), str(error).encode())))


class Lane(_Frames):
    """The end of a client of GPUDevice that lives in an event loop. Made by `open_lane`; `blocking_lane` has another one.

    Attributes:
        on_end: called when it is closed or breaks.
        server_pid: the server's process; 0: not seen from here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_end: Callable[[], None] = lambda: None
        self.server_pid = 0
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.server_pid, _ = credentials_of(transport.get_extra_info("socket"))

    @property
    def is_open(self) -> bool:
        """Whether the other process is there, as far as known."""
        return self.transport is not None and not self.transport.is_closing()

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        """One RPC; cancelling it cancels it at the other end.

        Raises:
            MessageTooLarge: the request is not for a lane. It was not sent.
            DsmlError: as over gRPC (`status.error_of`).
        """
        if not self.is_open:
            raise Unavailable("the lane is closed")
        payload = request_payload(method, request)
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        answer = self._waiting[number] = loop.create_future()
        expiry = None if timeout_s is None else loop.call_later(timeout_s, self._expire, answer)
        self.send(number, REQUEST, payload)
        try:
            payload = await answer
        except BaseException:
            self.send(number, CANCEL, b"")
            raise
        finally:
            del self._waiting[number]
            if expiry is not None:
                expiry.cancel()
        return answer_of("GPUDevice", method, payload)

    @staticmethod
    def _expire(answer: asyncio.Future[bytes]) -> None:
        if not answer.done():
            answer.set_exception(NoAnswer("no answer before the call's deadline"))

    def frame(self, number: int, kind: int, payload: bytes) -> None:
        answer = self._waiting.get(number)
        if answer is None or answer.done():  # given up meanwhile
            return
        if kind == ANSWER:
            answer.set_result(payload)
        elif kind == REFUSAL:
            answer.set_exception(refusal_of_frame(payload))

    def connection_lost(self, exc: Exception | None) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(Unavailable("the connection broke"))
        self.on_end()


async def open_lane(name: str) -> Lane | None:
    """A lane to the server of that name; None where it cannot be reached from here."""
    if not name or not can_have_lanes():
        return None
    with contextlib.suppress(OSError):
        _, lane = await asyncio.get_running_loop().create_unix_connection(Lane, f"\0{name}")
        return lane if lane.is_open else None
    return None
