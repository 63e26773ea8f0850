"""StreamSend without gRPC's copies: a second port of a server, which speaks HTTP/2 by itself, and the client of it.

The wire is gRPC's, so any client of gRPC may call it. gRPC for Python copies a payload twice on its way out and three times
on its way in, and wakes several threads for it; here it is copied by the system alone, and everything happens in the event
loop. A server tells of the port as HTTP does (RFC 7838), by `alt-svc` in the metadata of its answer to a StreamSend call on
its gRPC port. A client that does not connect to it goes on as before.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from dsml_gpu.errors import AmbiguousStream, DsmlError, MalformedMessage, OperationAborted, PeerUnavailable, error_from
from dsml_gpu.transport.incoming import Incoming, IncomingTable
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire import http2
from dsml_gpu.wire.codec import Chunk, decode_chunk, pieces_of
from dsml_gpu.wire.http2_connection import PREFIX_BYTES, STREAM_WINDOW_BYTES, Connection, Receiving
from dsml_gpu.wire.status import MAX_MESSAGE_CHARACTERS, REFUSAL_KEY
from dsml_gpu.wire.stubs import DEFAULT_MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

#: Metadata by which a server tells of its data port.
ALTERNATIVE_KEY = "alt-svc"
_ALTERNATIVE = re.compile(r'\bh2c=":(\d{1,5})"')
_PATH = "/gpu_sim.GPUDevice/StreamSend"
#: How long a connection may take to come about; until then streams go by gRPC.
_CONNECT_S = 5.0
_MAX_STREAMS = 4096
_SETTINGS = (
    (http2.MAX_CONCURRENT_STREAMS, _MAX_STREAMS),
    (http2.INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES),
    (http2.MAX_FRAME_SIZE, http2.LONGEST_FRAME_BYTES),
)
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
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
        super().__init__(sock, _SETTINGS, is_client=False)
        self._table = table
        self._on_lost = on_lost
        self._calls: dict[int, _Call] = {}
        self._latest = 0  # of the streams that have begun
        self._handshake = self._loop.call_later(_CONNECT_S, self._expect_preface)

    def _expect_preface(self) -> None:
        if self.awaits_preface:
            self.close(f"the client said nothing for {_CONNECT_S:g} s")

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
        if len(self._calls) >= _MAX_STREAMS:
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


class DataConnection(Connection):
    """A client's connection to the data port of a peer.

    Args:
        sock: connected to it.
        authority: the server's, as HTTP says.
    """

    def __init__(self, sock: socket.socket, authority: str) -> None:
        self._streams: dict[int, DataStream] = {}
        self._next = 1
        self._authority = authority
        #: When the peer has told its settings, or is gone.
        self.is_ready = asyncio.get_running_loop().create_future()
        self._goes_away = False
        super().__init__(sock, _SETTINGS, is_client=True)

    @property
    def usable(self) -> bool:
        """New streams may begin."""
        usable: bool = self.is_ready.done() and not self.closed and not self._goes_away
        return usable and len(self._streams) < _MAX_STREAMS and self._next < http2.LARGEST_WINDOW_BYTES

    def open(self) -> DataStream:
        """A StreamSend call, which begins with its first message."""
        return DataStream(self)

    def begin(self, stream: DataStream) -> tuple[int, bytes]:
        """Begins a call; returns its number and the frame that must go next: streams begin in the order of their numbers."""
        number = self._next
        self._next += 2
        self._streams[number] = stream
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", _PATH),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        return number, http2.headers_frame(number, 0, headers)

    def forget(self, stream: int) -> None:
        """What still comes of a stream is dropped."""
        self._streams.pop(stream, None)

    def receiving(self, stream: int) -> Receiving | None:
        return self._streams[stream].receiving if stream in self._streams else None

    def on_payload(self, stream: int, nbytes: int) -> None:
        pass  # answers are shorter than any window

    def on_headers(self, stream: int, block: bytes) -> None:
        if stream in self._streams:
            self._streams[stream].on_headers(http2.read_headers(block))

    def on_end_stream(self, stream: int) -> None:
        if stream in self._streams:
            self._streams[stream].finish(None)

    def on_reset(self, stream: int) -> None:
        if stream in self._streams:
            self._streams[stream].finish(_ended_early())

    def on_window(self, stream: int, nbytes: int) -> None:
        if stream in self._streams:
            self._streams[stream].widen(nbytes)
        elif not stream:
            for each in self._streams.values():
                each.widen(0)

    def on_settings(self, wider: int) -> None:
        for each in self._streams.values():
            each.widen(wider)
        if not self.is_ready.done():
            self.is_ready.set_result(None)

    def on_goaway(self) -> None:
        self._goes_away = True

    def on_lost(self, reason: str) -> None:
        if not self.is_ready.done():
            self.is_ready.set_result(None)
        for stream in list(self._streams.values()):
            stream.finish(PeerUnavailable(reason))


class DataStream:
    """One StreamSend call; see `outgoing.OutgoingStream`.

    Args:
        connection: to the peer.
    """

    def __init__(self, connection: DataConnection) -> None:
        self.receiving = Receiving(lambda _: None, lambda _: None)
        self._connection = connection
        self._number = 0  # not begun yet
        self._window = 0
        self._succeeded = False
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        #: What `write` waits for: room in a window, or the system that takes a frame.
        self._waits: asyncio.Future[None] | None = None

    async def write(self, chunk: Chunk) -> None:
        """Sends one message; the system has its bytes when this returns."""
        pieces = [memoryview(piece).cast("B") for piece in pieces_of(chunk)]
        nbytes = sum(len(piece) for piece in pieces)
        pieces.insert(0, memoryview(prefix_of(nbytes)))
        nbytes += PREFIX_BYTES
        connection = self._connection
        while nbytes:
            self._check()
            if not self._number:
                self._window = connection.stream_window
            room = min(self._window, connection.window, connection.longest_frame, nbytes)
            if room <= 0:
                await self._wait(asyncio.get_running_loop().create_future())
                continue
            self._window -= room
            connection.window -= room
            nbytes -= room
            beginning = self._begin()
            header = http2.frame_header(room, http2.DATA, 0, self._number)
            gone = connection.send([beginning + header, *_cut(pieces, room)])
            if gone is not None:
                await self._wait(gone)
        self._check()

    async def end(self) -> None:
        """See `OutgoingStream`."""
        self._check()
        beginning = self._begin()
        self._connection.send([beginning + http2.frame(http2.DATA, http2.END_STREAM, self._number)])

    async def response(self) -> None:
        """See `OutgoingStream`."""
        await asyncio.shield(self._ended)

    def on_end(self, callback: Callable[[], None]) -> None:
        """See `OutgoingStream`."""
        self._ended.add_done_callback(lambda _: callback())

    def cancel(self) -> None:
        """See `OutgoingStream`."""
        if not self._ended.done():
            if self._number:
                self._connection.reset(self._number, http2.CANCEL)
            self.finish(OperationAborted("the stream was cancelled"))

    async def why_ended(self) -> DsmlError:
        """See `OutgoingStream`."""
        with suppress(DsmlError):
            await asyncio.shield(self._ended)
        error = self._ended.exception()
        return error if isinstance(error, DsmlError) else _ended_early()

    def on_headers(self, headers: dict[str, str]) -> None:
        """The server's answer begins or ends."""
        status = headers.get("grpc-status")
        if status is None:
            return
        if status == "0":
            self._succeeded = True
            return
        code = _CODES.get(int(status) if status.isdecimal() else -1, grpc.StatusCode.UNKNOWN)
        self.finish(error_from(code.name, http2.unquoted(headers.get("grpc-message", "")), headers.get(REFUSAL_KEY)))

    def finish(self, error: DsmlError | None) -> None:
        """The call is over. The first time counts."""
        self._connection.forget(self._number)
        if self._ended.done():
            return
        if error is None and not self._succeeded:
            error = _ended_early()
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)
            self._ended.exception()  # an error that nobody waits for is no defect
        self._wake()

    def widen(self, nbytes: int) -> None:
        """The peer takes more; 0: of all streams together."""
        self._window += nbytes
        self._wake()

    def _begin(self) -> bytes:
        """What goes ahead of the first frame."""
        if self._number:
            return b""
        self._number, headers = self._connection.begin(self)
        return headers

    def _check(self) -> None:
        if self._connection.closed:
            self.finish(PeerUnavailable("the connection broke"))
        if self._ended.done():
            error = self._ended.exception()
            raise error if isinstance(error, DsmlError) else _ended_early()

    async def _wait(self, until: asyncio.Future[None]) -> None:
        self._waits = until
        try:
            await until
        finally:
            self._waits = None

    def _wake(self) -> None:
        if self._waits is not None and not self._waits.done():
            self._waits.set_result(None)


async def connect(host: str, port: int, authority: str) -> DataConnection | None:
    """A connection to a data port; None where none comes about."""
    loop = asyncio.get_running_loop()

    async def try_to() -> DataConnection | None:
        family, kind, protocol, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, address)
        except BaseException:
            sock.close()
            raise
        connection = DataConnection(sock, authority)
        try:
            await connection.is_ready
        except BaseException:
            connection.close("it took too long")
            raise
        return connection

    try:
        connection = await asyncio.wait_for(try_to(), _CONNECT_S)
    except (OSError, asyncio.TimeoutError) as error:
        log.info("no connection to the data port %s:%d, streams go by gRPC: %r", host, port, error)
        return None
    return connection if connection is not None and connection.usable else None


def listening_host(address: str) -> str:
    """The host to listen on of a server that others reach at `address`; empty: all addresses."""
    host = address.rpartition(":")[0].strip("[]")
    # A server that listens on all addresses tells its host name.
    return "" if host == socket.gethostname() else host


def port_of(metadata: Sequence[tuple[str, str | bytes]] | None) -> int:
    """The data port that a server's metadata tell of; 0: none."""
    for key, value in metadata or ():
        if key == ALTERNATIVE_KEY and (match := _ALTERNATIVE.search(str(value))):
            return int(match[1])
    return 0


def prefix_of(nbytes: int) -> bytes:
    """What goes before a message of gRPC."""
    return b"\0" + nbytes.to_bytes(PREFIX_BYTES - 1, "big")


def _cut(pieces: list[memoryview], nbytes: int) -> list[memoryview]:
    """Takes so many bytes off the beginning of a list of pieces."""
    taken = []
    while nbytes:
        if len(pieces[0]) > nbytes:
            taken.append(pieces[0][:nbytes])
            pieces[0] = pieces[0][nbytes:]
            break
        nbytes -= len(pieces[0])
        taken.append(pieces.pop(0))
    return taken


def _ended_early() -> DsmlError:
    return OperationAborted("the other side ended the stream early")
