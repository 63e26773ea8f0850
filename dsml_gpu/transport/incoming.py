"""Incoming StreamSend calls and those who wait for them: whoever comes first waits, and never for ever."""

from __future__ import annotations

import asyncio
import time

from dsml_gpu.errors import AmbiguousStream, DsmlError, OperationTimeout, StreamInUse, TooManyStreams
from dsml_gpu.transport.emulation import DeviceLink, TimedQueue
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.transport.timer import Timer

#: Messages of a stream that are held ready beside the one in use; what bounds a receiver's memory.
_DEPTH = 2
#: Streams that may be open at a time.
_MAX_OPEN = 4096

#: A payload; None is the end of the stream.
_Message = memoryview | bytes | None


class ArrivalQueue:
    """For messages what a `ClosableQueue` is, behind the emulated link of the device that receives them.

    `get` gives each when the link has received it.

    Args:
        timer: what it waits by.

    Attributes:
        link: the device's; must be known before the first `get`. What comes before that counts from when it came.
    """

    def __init__(self, timer: Timer) -> None:
        self.link: DeviceLink | None = None
        #: Messages, when they came, and when the link has received them.
        self._messages: TimedQueue[tuple[_Message, float, float | None]] = TimedQueue(timer, _DEPTH)

    async def put(self, message: _Message) -> None:
        """See `ClosableQueue`."""
        came_s = time.monotonic()
        await self._messages.put((message, came_s, None if self.link is None else _received(self.link, came_s, message)))

    async def get(self) -> _Message:
        """See `ClosableQueue`."""
        message, came_s, received_s = await self._messages.get()
        if received_s is None:
            assert self.link is not None
            received_s = _received(self.link, came_s, message)
        await self._messages.until(received_s)
        return message

    def close(self, error: DsmlError) -> None:
        """See `ClosableQueue`."""
        self._messages.close(error)


def _received(link: DeviceLink, came_s: float, message: _Message) -> float:
    return link.ingress.receive(came_s, 0 if message is None else len(message))


class Incoming:
    """One stream of messages from another device.

    The server's handler puts messages in and waits for `ended`; the receiver gets them and calls `complete` or `fail`.

    Args:
        stream_id: its number.
        messages: what they lie in meanwhile.
    """

    def __init__(self, stream_id: int, messages: ClosableQueue[_Message] | ArrivalQueue) -> None:
        self.stream_id = stream_id
        self.messages = messages
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.offered = False
        self.claimed = False
        self.accept_unnamed = False
        self.expiry: asyncio.TimerHandle | None = None

    @property
    def awaits_unnamed(self) -> bool:
        """A receiver waits that takes a sender which names no stream."""
        return self.accept_unnamed and not self.offered and not self.ended.done()

    def complete(self) -> None:
        """The receiver has taken everything."""
        if not self.ended.done():
            self.ended.set_result(None)

    def fail(self, error: DsmlError) -> None:
        """Either end gives up; the other one raises `error`."""
        self.messages.close(error)
        if not self.ended.done():
            self.ended.set_exception(error)
            self.ended.exception()  # an error that nobody waits for is no defect


class IncomingTable:
    """The incoming streams of one server, by stream id.

    Args:
        timeout_s: a stream whose other end does not come for so long fails.
        timer: where the devices of the server have emulated links.
    """

    def __init__(self, timeout_s: float, timer: Timer | None = None) -> None:
        self._timeout_s = timeout_s
        self._timer = timer
        self._open: dict[int, Incoming] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_emulated(self) -> bool:
        """Messages wait for emulated links."""
        return self._timer is not None

    def offer(self, stream_id: int) -> Incoming:
        """For the handler of a StreamSend call: the stream into which its messages go.

        Args:
            stream_id: from the first message; 0 where the sender names none, which means the only stream that a receiver
                waits for.

        Raises:
            StreamInUse: the stream has a sender already.
            AmbiguousStream: `stream_id` is 0 and not exactly one receiver waits.
            TooManyStreams: too many streams are open already.
        """
        if stream_id == 0:
            candidates = [stream for stream in self._open.values() if stream.awaits_unnamed]
            if len(candidates) != 1:
                raise AmbiguousStream(
                    f"StreamSend names no stream, and {len(candidates)} receives wait here; exactly 1 is needed"
                )
            stream_id = candidates[0].stream_id
        stream = self._find_or_make(stream_id)
        if stream.offered:
            raise StreamInUse(f"stream {stream_id} has a sender already")
        stream.offered = True
        self._stop_clock_if_met(stream)
        return stream

    def claim(self, stream_id: int, accept_unnamed: bool = False, link: DeviceLink | None = None) -> Incoming:
        """For the receiver of a stream; messages come when the sender does.

        Args:
            accept_unnamed: also take a sender that names no stream.
            link: of the device that receives, where links are emulated.

        Raises:
            StreamInUse: the stream has a receiver already.
            TooManyStreams: too many streams are open already.
        """
        stream = self._find_or_make(stream_id)
        if stream.claimed:
            raise StreamInUse(f"stream {stream_id} has a receiver already")
        stream.claimed = True
        stream.accept_unnamed = accept_unnamed
        if isinstance(stream.messages, ArrivalQueue):
            stream.messages.link = link
        self._stop_clock_if_met(stream)
        return stream

    def _find_or_make(self, stream_id: int) -> Incoming:
        stream = self._open.get(stream_id)
        if stream is None:
            if len(self._open) >= _MAX_OPEN:
                raise TooManyStreams(f"{_MAX_OPEN} streams are open here already")
            messages = ClosableQueue[_Message](_DEPTH) if self._timer is None else ArrivalQueue(self._timer)
            stream = self._open[stream_id] = Incoming(stream_id, messages)
            stream.ended.add_done_callback(lambda _: self._forget_if_met(stream))
            stream.expiry = asyncio.get_running_loop().call_later(self._timeout_s, self._expire, stream)
        return stream

    def _stop_clock_if_met(self, stream: Incoming) -> None:
        if stream.offered and stream.claimed and stream.expiry is not None:
            stream.expiry.cancel()
            if stream.ended.done():  # the first end gave up before the second came, which hears of it now
                self._forget_if_met(stream)

    def _forget_if_met(self, stream: Incoming) -> None:
        if stream.offered and stream.claimed:
            self._open.pop(stream.stream_id, None)

    def _expire(self, stream: Incoming) -> None:
        self._open.pop(stream.stream_id, None)
        missing = "receiver" if stream.offered else "sender"
        stream.fail(OperationTimeout(f"the {missing} of stream {stream.stream_id} did not come for {self._timeout_s:g} s"))
