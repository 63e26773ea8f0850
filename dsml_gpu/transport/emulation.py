"""Emulated network links: on one machine, what a slow network does to a collective.

Each device has one link, of a bandwidth and a latency, full duplex: all that it sends by the gRPC transport goes through the
link's one direction, all that it receives through the other one. A message leaves when the link has sent it and what came
before it; it is handed to gRPC one latency later, while the next ones leave; and the receiver gets it when its own link,
which several senders may share, has received it. What gRPC and the machine take on top is not taken off.

Schedules are computed from ideal times, never from when somebody woke up, so that lateness does not add up. Messages
are never faster than their link. Only payload counts, only between devices: control messages, copies to and from the host,
answers, and the p2p transport are as fast as the machine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from dsml_gpu.errors import DsmlError, InvalidValue
from dsml_gpu.transport.queue import ClosableQueue
from dsml_gpu.transport.timer import Timer
from dsml_gpu.wire.codec import Chunk, encode_chunk
from dsml_gpu.wire.outgoing import OutgoingStream

T = TypeVar("T")

#: What may travel at a time on a link of unlimited bandwidth, from one stream; as the window of a connection, it limits the
#: stream to so many bytes in each latency.
_WINDOW_BYTES = 32 << 20
#: What may travel beside what bandwidth and latency make travel, so that a late wake-up holds nobody up.
_SPARE_BYTES = 4 << 20
#: Times in which a link was busy that are remembered. A message can only have met those since it began to arrive.
_MAX_BUSY = 64


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What a device's link is made to look like.

    Attributes:
        latency_s: how long a message travels, in one direction.
        bytes_per_s: what the link sends at most, and beside that receives at most; 0: as much as the machine can.

    Raises:
        InvalidValue: on construction, where a value does not do.
    """

    latency_s: float = 0.0
    bytes_per_s: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise InvalidValue(f"the latency of a link must be 0 s or more, not {self.latency_s:g} s")
        if self.bytes_per_s != 0 and not 1 <= self.bytes_per_s < math.inf:
            raise InvalidValue(
                f"the bandwidth of a link must be 1 byte/s or more, or 0 for no limit, not {self.bytes_per_s:g} bytes/s"
            )

    @property
    def emulated(self) -> bool:
        """Whether there is anything to emulate."""
        return self.latency_s > 0 or self.bytes_per_s > 0

    @property
    def window_bytes(self) -> float:
        """What may travel at a time from one stream."""
        return self.bytes_per_s * self.latency_s + _SPARE_BYTES if self.bytes_per_s else _WINDOW_BYTES

    def transmission_s(self, nbytes: int) -> float:
        """How long the link is busy with a message."""
        return nbytes / self.bytes_per_s if self.bytes_per_s else 0.0


class EgressClock:
    """When messages have left through a link. Only arithmetic: it waits for nothing."""

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        self._free_s = -math.inf

    def leave(self, ready_s: float, nbytes: int) -> float:
        """When the next message has left, which could leave from `ready_s` on."""
        self._free_s = max(self._free_s, ready_s) + self._settings.transmission_s(nbytes)
        return self._free_s


class IngressClock:
    """When a link has received messages that came off the wire. Only arithmetic: it waits for nothing.

    A message that met no other was spread over time by its sender's link and is not delayed again: the link counts as having
    received it while it arrived. Messages that arrived at the same time share the link, in the order in which they were
    complete.
    """

    def __init__(self, settings: LinkSettings) -> None:
        self._settings = settings
        #: Beginnings and ends, oldest first, with gaps between.
        self._busy: deque[tuple[float, float]] = deque(maxlen=_MAX_BUSY)

    def receive(self, arrived_s: float, nbytes: int) -> float:
        """When the link has received a message whose last byte came at `arrived_s`."""
        needed_s = self._settings.transmission_s(nbytes)
        start_s = arrived_s - needed_s
        # The wire was never idle since the message began to arrive, so from then on all that came is one piece of work.
        while self._busy and self._busy[-1][1] > start_s:
            other_start_s, other_end_s = self._busy.pop()
            needed_s += other_end_s - other_start_s
            start_s = min(start_s, other_start_s)
        end_s = max(arrived_s, start_s + needed_s)
        self._busy.append((start_s, end_s))
        return end_s


class DeviceLink:
    """The emulated link of one device.

    Args:
        settings: what it looks like.
        timer: of the event loop in which the device lives.
    """

    def __init__(self, settings: LinkSettings, timer: Timer) -> None:
        self.settings = settings
        self.timer = timer
        self.egress = EgressClock(settings)
        self.ingress = IngressClock(settings)


class TimedQueue(ClosableQueue[T]):
    """A queue whose ends can also wait for a time; `close` ends that like any other wait.

    Args:
        timer: what they wait by.
        depth: see `ClosableQueue`.
    """

    def __init__(self, timer: Timer, depth: int = 0) -> None:
        super().__init__(depth)
        self._timer = timer
        self._until: set[asyncio.Future[None]] = set()

    async def until(self, time_s: float) -> None:
        """Returns at this time of `time.monotonic`. Raises the error of `close`."""
        if self._error is None and time_s > time.monotonic():
            its_time = self._timer.at(time_s)
            self._until.add(its_time)
            try:
                await its_time
            finally:
                self._until.discard(its_time)
        if self._error is not None:
            raise self._error

    def close(self, error: DsmlError) -> None:
        super().close(error)
        for its_time in self._until:
            if not its_time.done():
                its_time.set_result(None)


@dataclass(frozen=True, slots=True)
class _Travelling:
    """A message that has left, as wire bytes, and when it arrives at the other end of the wire."""

    message: bytes
    nbytes: int
    arrives_s: float


class DelayLine:
    """One stream's way through its device's link: messages wait for the link, leave, travel, and go to gRPC.

    Args:
        stream: the call that they go to.
        link: the device's.
    """

    def __init__(self, stream: OutgoingStream, link: DeviceLink) -> None:
        self._stream = stream
        self._link = link
        self._travelling: TimedQueue[_Travelling | None] = TimedQueue(link.timer)
        self._travelling_bytes = 0
        self._room: asyncio.Future[None] | None = None
        self._carrier: asyncio.Task[None] | None = None

    async def write(self, chunk: Chunk, ready_s: float) -> None:
        """Returns when a message has left, and its bytes are needed no more.

        Args:
            ready_s: since when it waits to leave.

        Raises:
            DsmlError: of `close`.
        """
        if not self._has_room:
            self._room = asyncio.get_running_loop().create_future()
            await self._room
            ready_s = time.monotonic()  # a link that was held up has not saved bandwidth for later
        nbytes = memoryview(chunk.data).nbytes
        left_s = self._link.egress.leave(ready_s, nbytes)
        # Encoded here and not by gRPC, which would copy the copy.
        message = encode_chunk(chunk)
        await self._travelling.until(left_s)
        self._put(_Travelling(message, nbytes, left_s + self._link.settings.latency_s))

    async def end(self) -> None:
        """Returns when all messages have arrived and gRPC knows that no other follows. Raises as `OutgoingStream`."""
        self._put(None)
        assert self._carrier is not None
        await self._carrier

    def close(self, error: DsmlError) -> None:
        """From now on `write` and `end` raise `error`, and what travels is lost; the first close counts."""
        self._travelling.close(error)
        self._end_wait_for_room()

    async def stop(self) -> None:
        """Ends what it does by itself. Idempotent."""
        if self._carrier is not None:
            self._carrier.cancel()
            await asyncio.gather(self._carrier, return_exceptions=True)

    def _put(self, message: _Travelling | None) -> None:
        self._travelling.put_nowait(message)
        self._travelling_bytes += 0 if message is None else message.nbytes
        if self._carrier is None:
            self._carrier = asyncio.get_running_loop().create_task(self._carry())

    async def _carry(self) -> None:
        while (message := await self._travelling.get()) is not None:
            await self._travelling.until(message.arrives_s)
            await self._stream.write(message.message)
            self._travelling_bytes -= message.nbytes
            if self._has_room:
                self._end_wait_for_room()
        await self._stream.end()

    @property
    def _has_room(self) -> bool:
        return self._travelling_bytes < self._link.settings.window_bytes

    def _end_wait_for_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
