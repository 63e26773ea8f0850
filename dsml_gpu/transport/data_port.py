"""StreamSend without gRPC's copies: a second port of a server, which speaks HTTP/2 by itself. `data_stream` is its client.

The wire is gRPC's, so any client of gRPC may call it. gRPC for Python copies a payload twice on its way out and three times
on its way in, and wakes several threads for it; here it is copied by the system alone, and everything happens in the event
loop. A server tells of the port as HTTP does (RFC 7838), by `alt-svc` in the metadata of its answer to a StreamSend call on
its gRPC port. A client that does not connect to it goes on as before.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dsml_gpu.errors import AmbiguousStream, DsmlError, MalformedMessage, OperationAborted
from dsml_gpu.transport.incoming import Incoming, IncomingTable
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire import http2
from dsml_gpu.wire.codec import Chunk, decode_chunk
from dsml_gpu.wire.http2_connection import PREFIX_BYTES, STREAM_WINDOW_BYTES, Connection, Receiving
from dsml_gpu.wire.status import MAX_MESSAGE_CHARACTERS, REFUSAL_KEY
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

#: Metadata by which a server tells of its data port.
ALTERNATIVE_KEY = "alt-svc"
#: How long a connection may take to come about; until then streams go by gRPC.
CONNECT_S = 5.0
MAX_STREAMS = 4096
SETTINGS = (
    (http2.MAX_CONCURRENT_STREAMS, MAX_STREAMS),
    (http2.INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES),
    (http2.MAX_FRAME_SIZE, http2.LONGEST_FRAME_BYTES),
)
_ANSWER = [(":status", "200"), ("content-type", "application/grpc")]


class DataPort:
    """The port of one server. Used from one event loop.

    Args:
        table: where its streams go.
        host: to listen on; empty: all addresses.
    """

    def __init__(self, table: IncomingTable, host: str) -> None:
        self._table = table
        self._host = host
        self._listener: socket.socket | None = None
        self._connections: set[_ServerConnection] = set()

    @property
    def alternative(self) -> str:
        """What the `alt-svc` of this port is; it listens from the first time on that it is asked."""
        if self._listener is None:
            family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
            self._listener = socket.create_server((self._host, 0), family=family)
            self._listener.setblocking(False)
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
        return f'h2c=":{self._listener.getsockname()[1]}"'

    async def announce(self, context: Any) -> None:
        """Tells the client of a StreamSend call of the port."""
        with suppress(OSError):  # no port is left: gRPC's own is there
            await context.send_initial_metadata(((ALTERNATIVE_KEY, self.alternative),))

    def close(self) -> None:
        """Closes the port and all its connections. Idempotent."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for connection in list(self._connections):
            connection.close("the server shuts down")

    def _accept(self) -> None:
        assert self._listener is not None
        with suppress(OSError):  # it went away again
            connection, _ = self._listener.accept()
            self._connections.add(_ServerConnection(connection, self._table, self._connections.discard))


class _ServerConnection(Connection):
    """One client's connection."""

    def __init__(self, sock: socket.socket, table: IncomingTable, on_lost: Callable[[_ServerConnection], None]) -> None:
        super().__init__(sock, SETTINGS, is_client=False)
        self._table = table
        self._on_lost = on_lost
        self._calls: dict[int, _Call] = {}
        self._latest = 0  # of the streams that have begun
        self._handshake = self._loop.call_later(CONNECT_S, self._expect_preface)

    def _expect_preface(self) -> None:
        if self.awaits_preface:
            self.close(f"the client said nothing for {CONNECT_S:g} s")

    def forget(self, stream: int) -> None:
        """What still comes of a stream is dropped."""
        self._calls.pop(stream, None)

    def receiving(self, stream: int) -> Receiving | None:
        call = self._calls.get(stream)
        return None if call is None else call.receiving

    def on_payload(self, stream: int, nbytes: int) -> None:
        call = self._calls.get(stream)
        if call is not None:
            call.granted -= nbytes
            call.announced += nbytes
            if call.granted < 0:
                raise http2.ProtocolError("more than the window lets pass", http2.FLOW_CONTROL_ERROR)

    def on_headers(self, stream: int, block: bytes) -> None:
        # They are not read, since whoever calls this port calls StreamSend.
        if stream <= self._latest:
            return  # of a stream that is known, or over
        self._latest = stream
        if len(self._calls) >= MAX_STREAMS:
            self.reset(stream, http2.CANCEL)
            return
        self._calls[stream] = _Call(self, stream, self._table)

    def on_end_stream(self, stream: int) -> None:
        if stream in self._calls:
            self._calls[stream].on_end()

    def on_reset(self, stream: int) -> None:
        if stream in self._calls:
            self._calls.pop(stream).on_lost()

    def on_window(self, stream: int, nbytes: int) -> None:
        pass  # answers are shorter than any window

    def on_settings(self, wider: int) -> None:
        pass

    def on_goaway(self) -> None:
        pass

    def on_lost(self, reason: str) -> None:
        self._handshake.cancel()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.on_lost()
        self._on_lost(self)


class _Call:
    """One StreamSend call, on the server's side; as `grpc.serve_stream_send`.

    Attributes:
        granted: what the client may still send.
        announced: payload of the frames that have begun to come.
    """

    def __init__(self, connection: _ServerConnection, stream: int, table: IncomingTable) -> None:
        self.receiving = Receiving(self._on_message, self._on_begin)
        self.granted = STREAM_WINDOW_BYTES
        self.announced = 0
        self._connection = connection
        self._stream = stream
        self._table = table
        self._incoming: Incoming | None = None
        self._extra = 0  # granted beyond the window, for a message that is longer
        self._owed = 0  # taken, but not granted again yet
        self._has_ended = False
        self._over = False

    def on_end(self) -> None:
        """The client has sent all."""
        self._has_ended = True
        if self._incoming is None:
            self._refuse(AmbiguousStream("StreamSend ended before its first message"))
        elif not self.receiving.between_messages:
            self._refuse(MalformedMessage("StreamSend ended within a message"))
        else:
            self._put(None)

    def on_lost(self) -> None:
        """The client has given up or is gone; those who talk to it themselves can tell which."""
        self._over = True
        if self._incoming is not None:
            self._incoming.fail(OperationAborted("the sender gave up, or its connection broke"))

    def _on_begin(self, nbytes: int) -> None:
        if nbytes > DEFAULT_MAX_MESSAGE_BYTES:
            raise http2.ProtocolError(f"a message of {nbytes} bytes")
        missing = nbytes - (self.announced - self.receiving.position) - self.granted
        if missing > 0:
            self._extra += missing
            self._grant(missing)

    def _on_message(self, message: memoryview) -> None:
        if self._over:
            return
        try:
            chunk = decode_chunk(message)
            if self._incoming is None:
                self._begin(chunk)
        except DecodeError as error:
            self._refuse(MalformedMessage(f"the {len(message)} bytes of the request are not a DataChunk: {error}"))
            return
        except DsmlError as error:
            self._refuse(error)
            return
        data = memoryview(chunk.data)
        self._credit(len(message) - data.nbytes + PREFIX_BYTES)
        if data.nbytes:
            self._put(data)

    def _begin(self, first: Chunk) -> None:
        incoming = self._table.offer(first.header.streamId if first.header is not None else 0)
        assert isinstance(incoming.messages, ClosableQueue)
        incoming.messages.on_get = self._on_get
        incoming.ended.add_done_callback(self._on_ended)
        self._incoming = incoming

    def _put(self, message: memoryview | None) -> None:
        assert self._incoming is not None
        assert isinstance(self._incoming.messages, ClosableQueue)
        with suppress(DsmlError):  # `_on_ended` tells of it
            self._incoming.messages.put_nowait(message)

    def _on_get(self, message: memoryview | bytes | None) -> None:
        if message is not None:
            self._credit(len(message))

    def _credit(self, nbytes: int) -> None:
        paid = min(self._extra, nbytes)
        self._extra -= paid
        self._owed += nbytes - paid
        if self._owed >= STREAM_WINDOW_BYTES // 4 and not self._has_ended and not self._over:
            self._grant(self._owed)
            self._owed = 0

    def _grant(self, nbytes: int) -> None:
        self.granted += nbytes
        self._connection.send([http2.number_frame(http2.WINDOW_UPDATE, self._stream, nbytes)])

    def _on_ended(self, ended: asyncio.Future[None]) -> None:
        if self._over:
            return
        error = ended.exception()
        if error is not None:
            assert isinstance(error, DsmlError)
            self._refuse(error)
            return
        self._over = True
        answer = pb.StreamSendResponse(success=True).SerializeToString()
        self._connection.send(
            [
                http2.headers_frame(self._stream, 0, _ANSWER)
                + http2.frame(http2.DATA, 0, self._stream, prefix_of(len(answer)) + answer)
                + http2.headers_frame(self._stream, http2.END_STREAM, [("grpc-status", "0")])
            ]
        )
        self._connection.forget(self._stream)

    def _refuse(self, error: DsmlError) -> None:
        self._over = True
        status = [
            ("grpc-status", str(grpc.StatusCode[error.code].value[0])),
            ("grpc-message", http2.quoted(str(error)[:MAX_MESSAGE_CHARACTERS])),
            (REFUSAL_KEY, error.refusal),
        ]
        self._connection.send([http2.headers_frame(self._stream, http2.END_STREAM, [*_ANSWER, *status])])
        if not self._has_ended:
            self._connection.reset(self._stream, http2.NO_ERROR)
        self._connection.forget(self._stream)
        if self._incoming is not None:
            self._incoming.fail(error)


def listening_host(address: str) -> str:
    """The host to listen on of a server that others reach at `address`; empty: all addresses."""
    host = address.rpartition(":")[0].strip("[]")
    # A server that listens on all addresses tells its host name.
    return "" if host == socket.gethostname() else host


def prefix_of(nbytes: int) -> bytes:
    """What goes before a message of gRPC."""
    return b"\0" + nbytes.to_bytes(PREFIX_BYTES - 1, "big")
