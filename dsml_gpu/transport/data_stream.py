"""The client of a server's data port (`data_port`): one connection to each server, and StreamSend calls on it."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import grpc

from dsml_gpu.errors import DsmlError, OperationAborted, PeerUnavailable, error_from
from dsml_gpu.transport.data_port import ALTERNATIVE_KEY, CONNECT_S, MAX_STREAMS, SETTINGS, prefix_of
from dsml_gpu.wire import http2
from dsml_gpu.wire.codec import Chunk, pieces_of
from dsml_gpu.wire.http2_connection import PREFIX_BYTES, Connection, Receiving
from dsml_gpu.wire.status import REFUSAL_KEY

log = logging.getLogger(__name__)

_ALTERNATIVE = re.compile(r'\bh2c=":(\d{1,5})"')
_PATH = "/gpu_sim.GPUDevice/StreamSend"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


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
        super().__init__(sock, SETTINGS, is_client=True)

    @property
    def usable(self) -> bool:
        """New streams may begin."""
        usable: bool = self.is_ready.done() and not self.closed and not self._goes_away
        return usable and len(self._streams) < MAX_STREAMS and self._next < http2.LARGEST_WINDOW_BYTES

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
        connection = await asyncio.wait_for(try_to(), CONNECT_S)
    except (OSError, asyncio.TimeoutError) as error:
        log.info("no connection to the data port %s:%d, streams go by gRPC: %r", host, port, error)
        return None
    return connection if connection is not None and connection.usable else None


def port_of(metadata: Sequence[tuple[str, str | bytes]] | None) -> int:
    """The data port that a server's metadata tell of; 0: none."""
    for key, value in metadata or ():
        if key == ALTERNATIVE_KEY and (match := _ALTERNATIVE.search(str(value))):
            return int(match[1])
    return 0


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
