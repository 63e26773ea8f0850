"""One end of an HTTP/2 connection: an unblocking socket in an event loop, whose message payloads are not copied.

A payload goes from the sender's memory to the system, and from there into the buffer that the receiver gets. The messages
of a stream are gRPC's: each with a prefix of 5 bytes. All that ever waits for the other end are messages that the windows
of flow control do not let pass; the other end always reads.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from dsml_gpu.wire import http2
from dsml_gpu.wire.http2 import ProtocolError

#: What a stream may have on its way that its receiver has not taken: what bounds the memory of a receiver.
STREAM_WINDOW_BYTES = 4 << 20
#: Bytes of a socket that are read ahead of knowing what they are.
_AHEAD_BYTES = 20 << 10
#: The longest frame that carries no payload.
_LONGEST_CONTROL_BYTES = 16 << 10
#: Reads of a socket before others of the event loop get their turn.
_READS = 8
#: Buffers that the system takes at a time.
_MAX_BUFFERS = 16
#: Before each message of gRPC: whether it is compressed, and its length.
PREFIX_BYTES = 5


class Message:
    """A message that is on its way here.

    Args:
        nbytes: its length.

    Attributes:
        view: its bytes.
        missing: how many are not here yet; they are the last.
    """

    __slots__ = ("missing", "view")

    def __init__(self, nbytes: int) -> None:
        # What comes behind the tag and length of the message's first field is aligned: processors compute on it.
        start = -(1 + (nbytes.bit_length() + 6) // 7) % 8
        self.view = np.empty(start + nbytes, np.uint8).data[start:]
        self.missing = nbytes


class Receiving:
    """The messages of one stream, as they come.

    Args:
        on_message: called with each.
        on_begin: called with the length of each before its bytes come.
    """

    def __init__(self, on_message: Callable[[memoryview], None], on_begin: Callable[[int], None]) -> None:
        self._on_message = on_message
        self._on_begin = on_begin
        #: How many bytes have come, prefixes included.
        self.position = 0
        self._prefix = bytearray()
        self._message: Message | None = None

    @property
    def between_messages(self) -> bool:
        """Nothing of a message is here whose rest is missing."""
        return self._message is None and not self._prefix

    def rest(self) -> memoryview | None:
        """Where the next bytes go; None while it is not known."""
        message = self._message
        return None if message is None else message.view[len(message.view) - message.missing :]

    def filled(self, nbytes: int) -> None:
        """So many bytes are in `rest` now."""
        message = self._message
        assert message is not None
        message.missing -= nbytes
        self.position += nbytes
        if not message.missing:
            self._message = None
            self._on_message(message.view)

    def take(self, data: memoryview) -> None:
        """The next bytes, wherever they are."""
        while data:
            if self._message is None:
                missing = PREFIX_BYTES - len(self._prefix)
                self.position += len(data[:missing])
                self._prefix += data[:missing]
                data = data[missing:]
                if len(self._prefix) == PREFIX_BYTES:
                    self._begin()
            else:
                rest = self.rest()
                assert rest is not None
                nbytes = min(len(rest), len(data))
                rest[:nbytes] = data[:nbytes]
                data = data[nbytes:]
                self.filled(nbytes)

    def _begin(self) -> None:
        compressed, nbytes = self._prefix[0], int.from_bytes(self._prefix[1:], "big")
        self._prefix.clear()
        if compressed:
            raise ProtocolError("a message that is compressed")
        self._on_begin(nbytes)
        if nbytes:
            self._message = Message(nbytes)
        else:
            self._on_message(memoryview(b""))


class Connection(ABC):
    """What both ends of a connection have in common.

    Args:
        sock: connected.
        settings: which the other end is told.
        is_client: this end begins the streams.
    """

    def __init__(self, sock: socket.socket, settings: Sequence[tuple[int, int]], *, is_client: bool) -> None:
        sock.setblocking(False)
        with suppress(OSError):  # not TCP
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.closed = False
        #: What the other end takes: of the connection, of each new stream, and in one frame.
        self.window = http2.DEFAULT_WINDOW_BYTES
        self.stream_window = http2.DEFAULT_WINDOW_BYTES
        self.longest_frame = http2.DEFAULT_FRAME_BYTES
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._ahead = bytearray(_AHEAD_BYTES)
        self._first = self._last = 0  # of what is in `_ahead`
        self._data: tuple[int, int, int] | None = None  # of the DATA frame that is being read: stream, rest, padding
        self._headers: tuple[int, int, bytearray] | None = None  # of a HEADERS frame that goes on: stream, flags, block
        self._ends_stream = False  # that DATA frame
        #: The client has not begun yet.
        self.awaits_preface = not is_client
        self._received = 0  # since the window of the connection was last widened
        self._out: deque[tuple[memoryview, asyncio.Future[None] | None]] = deque()
        self._loop.add_reader(sock, self._read)
        widened = http2.number_frame(http2.WINDOW_UPDATE, 0, http2.LARGEST_WINDOW_BYTES - http2.DEFAULT_WINDOW_BYTES)
        self.send([(http2.PREFACE if is_client else b"") + http2.settings_frame(settings) + widened])

    # ---- what the ends add ----------------------------------------------------------------------------------------------

    @abstractmethod
    def receiving(self, stream: int) -> Receiving | None:
        """Where the payload of a stream goes; None where there is no such stream any more."""

    @abstractmethod
    def on_payload(self, stream: int, nbytes: int) -> None:
        """A DATA frame of so many bytes begins."""

    @abstractmethod
    def on_headers(self, stream: int, block: bytes) -> None:
        """Headers came, as `http2.read_headers` reads them."""

    @abstractmethod
    def on_end_stream(self, stream: int) -> None:
        """The other end has sent the last of a stream."""

    @abstractmethod
    def on_reset(self, stream: int) -> None:
        """The other end has given a stream up."""

    @abstractmethod
    def on_window(self, stream: int, nbytes: int) -> None:
        """The other end takes more of a stream."""

    @abstractmethod
    def on_settings(self, wider: int) -> None:
        """The other end has told its settings; each stream may send so many bytes more than before."""

    @abstractmethod
    def on_goaway(self) -> None:
        """The other end takes no new streams."""

    @abstractmethod
    def on_lost(self, reason: str) -> None:
        """The connection is closed; nothing comes or goes any more."""

    # ---- sending --------------------------------------------------------------------------------------------------------

    def send(self, parts: Sequence[Any]) -> asyncio.Future[None] | None:
        """Sends buffers in one piece.

        Returns:
            None: the system has taken them. A future: what is done when it has; until then they must not change.
        """
        if self.closed:
            return None
        views = [memoryview(part).cast("B") for part in parts]
        if not self._out:
            sent = self._send_now(views)
            while views and sent >= len(views[0]):
                sent -= len(views.pop(0))
            if not views or self.closed:
                return None
            views[0] = views[0][sent:]
            self._loop.add_writer(self._sock, self._flush)
        gone = self._loop.create_future()
        self._out.extend((view, None) for view in views[:-1])
        self._out.append((views[-1], gone))
        return gone

    def _send_now(self, views: Sequence[memoryview]) -> int:
        try:
            return self._sock.sendmsg(views)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            self._loop.call_soon(self.close, f"{error.strerror}")
            return 0

    def _flush(self) -> None:
        sent = self._send_now([view for view, _ in list(self._out)[:_MAX_BUFFERS]])
        while self._out:
            view, gone = self._out[0]
            if sent < len(view):
                self._out[0] = (view[sent:], gone)
                return
            sent -= len(view)
            self._out.popleft()
            if gone is not None and not gone.done():
                gone.set_result(None)
        self._loop.remove_writer(self._sock)

    def reset(self, stream: int, code: int) -> None:
        """Gives a stream up."""
        self.send([http2.number_frame(http2.RST_STREAM, stream, code)])

    def close(self, reason: str) -> None:
        """Closes the connection. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        out, self._out = self._out, deque()
        for _, gone in out:
            if gone is not None and not gone.done():
                gone.set_result(None)
        self.on_lost(reason)

    # ---- receiving ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            for _ in range(_READS):
                if self.closed or not self._read_once():
                    return
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.close(f"{error.strerror}")
        except ProtocolError as error:
            self.send([http2.goaway_frame(error.code, str(error))])
            self.close(str(error))

    def _read_once(self) -> bool:
        """Reads what is there, and tells whether there may be more."""
        rest = self._rest()
        if self._first:
            self._ahead[: self._last - self._first] = self._ahead[self._first : self._last]
            self._first, self._last = 0, self._last - self._first
        ahead = memoryview(self._ahead)[self._last :]
        if rest is None:
            nbytes = self._sock.recv_into(ahead)
            self._last += nbytes
            more = nbytes == len(ahead)
        else:
            nbytes = self._sock.recvmsg_into([rest, ahead])[0]
            filled = min(nbytes, len(rest))
            self._last += nbytes - filled
            more = nbytes == len(rest) + len(ahead)
            if filled:
                self._fill(filled)
        if not nbytes:
            self.close("the connection broke")
            return False
        self._parse()
        return more

    def _rest(self) -> memoryview | None:
        """Where the next bytes go without a detour; None where that is not known."""
        if self._data is None or self._first != self._last:
            return None
        stream, nbytes, _ = self._data
        receiving = self.receiving(stream)
        rest = None if receiving is None else receiving.rest()
        return None if rest is None else rest[:nbytes]

    def _fill(self, filled: int) -> None:
        assert self._data is not None
        stream, nbytes, padding = self._data
        receiving = self.receiving(stream)
        self._data = (stream, nbytes - filled, padding)
        assert receiving is not None
        receiving.filled(filled)

    def _parse(self) -> None:
        while not self.closed:
            if self._data is not None:
                if not self._parse_data():
                    return
            elif self.awaits_preface:
                if not self._parse_preface():
                    return
            elif self._last - self._first < http2.FRAME_HEADER_BYTES:
                return
            else:
                length, kind, flags, stream = http2.read_frame_header(self._ahead, self._first)
                start = self._first + http2.FRAME_HEADER_BYTES
                if kind == http2.DATA:
                    padded = bool(flags & http2.PADDED)
                    if padded and (not length or start == self._last):
                        if length:
                            return
                        raise ProtocolError("a frame without its padding", http2.FRAME_SIZE_ERROR)
                    self._begin_data(length, flags, stream, self._ahead[start] + 1 if padded else 0)
                    self._first = start + padded
                    continue
                if length > _LONGEST_CONTROL_BYTES:
                    raise ProtocolError(f"a frame of {length} bytes", http2.FRAME_SIZE_ERROR)
                if self._last - start < length:
                    return
                self._first = start + length
                self._control(kind, flags, stream, bytes(self._ahead[start : start + length]))

    def _parse_preface(self) -> bool:
        here = bytes(self._ahead[self._first : min(self._last, self._first + len(http2.PREFACE))])
        if not http2.PREFACE.startswith(here):
            raise ProtocolError("this is not HTTP/2")
        if len(here) < len(http2.PREFACE):
            return False
        self.awaits_preface = False
        self._first += len(here)
        return True

    def _begin_data(self, length: int, flags: int, stream: int, padding: int) -> None:
        """`padding` counts the byte that tells of it."""
        if padding > length or self._headers is not None or not stream:
            raise ProtocolError("a DATA frame that cannot be")
        self._received += length
        if self._received > http2.LARGEST_WINDOW_BYTES // 2:
            self.send([http2.number_frame(http2.WINDOW_UPDATE, 0, self._received)])
            self._received = 0
        self.on_payload(stream, length)
        self._ends_stream = bool(flags & http2.END_STREAM)
        self._data = (stream, length - padding, max(0, padding - 1))

    def _parse_data(self) -> bool:
        """Takes of a DATA frame what is here; tells whether that was all of it."""
        assert self._data is not None
        stream, nbytes, padding = self._data
        here = min(nbytes, self._last - self._first)
        if here:
            view = memoryview(self._ahead)[self._first : self._first + here]
            self._first += here
            self._data = (stream, nbytes - here, padding)
            receiving = self.receiving(stream)
            if receiving is not None:
                receiving.take(view)
            nbytes -= here
        if nbytes:
            return False
        skipped = min(padding, self._last - self._first)
        self._first += skipped
        if skipped < padding:
            self._data = (stream, 0, padding - skipped)
            return False
        self._data = None
        if self._ends_stream:
            self.on_end_stream(stream)
        return True

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if (self._headers is not None) != (kind == http2.CONTINUATION):
            raise ProtocolError("headers that do not go on, or others that do")
        if kind in (http2.HEADERS, http2.CONTINUATION):
            self._control_headers(kind, flags, stream, payload)
        elif kind == http2.SETTINGS:
            if not flags & http2.ACK:
                self._take_settings(http2.read_settings(payload))
        elif kind == http2.PING:
            if not flags & http2.ACK:
                self.send([http2.frame(http2.PING, http2.ACK, 0, payload)])
        elif kind == http2.WINDOW_UPDATE:
            nbytes = http2.read_number(payload) & http2.LARGEST_WINDOW_BYTES
            if not stream:
                self.window += nbytes
            self.on_window(stream, nbytes)
        elif kind == http2.RST_STREAM:
            self.on_reset(stream)
        elif kind == http2.GOAWAY:
            self.on_goaway()
        elif kind == http2.PUSH_PROMISE:
            raise ProtocolError("a promise that nobody asked for")

    def _control_headers(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == http2.HEADERS:
            first, last = 0, len(payload)
            if flags & http2.PADDED and payload:
                first, last = 1, last - payload[0]
            if flags & http2.WITH_PRIORITY:
                first += 5
            if first > last or not stream:
                raise ProtocolError("headers that cannot be")
            self._headers = (stream, flags, bytearray(payload[first:last]))
        else:
            assert self._headers is not None
            if self._headers[0] != stream or len(self._headers[2]) > _LONGEST_CONTROL_BYTES:
                raise ProtocolError("headers that go on elsewhere, or without end")
            self._headers[2].extend(payload)
        if flags & http2.END_HEADERS:
            (_, first_flags, block), self._headers = self._headers, None
            self.on_headers(stream, bytes(block))
            if first_flags & http2.END_STREAM:
                self.on_end_stream(stream)

    def _take_settings(self, settings: list[tuple[int, int]]) -> None:
        wider = 0
        for name, value in settings:
            if name == http2.INITIAL_WINDOW_SIZE:
                wider += value - self.stream_window
                self.stream_window = value
            elif name == http2.MAX_FRAME_SIZE:
                self.longest_frame = value
        self.send([http2.frame(http2.SETTINGS, http2.ACK, 0)])
        self.on_settings(wider)
