"""Whether device servers are alive: what they let hear of themselves, and what follows from silence.

A server sends heartbeats from the event loop in which its devices work. What ends them tells how it fares:

- Nothing comes for `Detection.dead_after_s`: it is dead, frozen or cut off, and given up. The time is counted in ticks of
  this process, each at most twice as long as it should be: a coordinator that was itself stopped or starved does not blame
  others for it. A process of this host that is seen to compute gets more time: slow is not dead.
- The stream breaks and nobody listens at the address: the process is gone. Somebody listens: the stream is opened anew, and
  the server is asked who it is, which tells a broken connection from a server that was restarted.
- The stream ends in order: the server was stopped.

Decisions are made here; what goes over the network is behind `Signs`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from dsml_gpu.errors import DsmlError, InvalidValue, OperationAborted, OperationTimeout, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb

log = logging.getLogger(__name__)

#: A tick counts as at most so many intervals.
_LONGEST_TICK = 2
#: A process that is seen to compute may be silent for so many times as long as another one.
_PATIENCE = 4
#: Between attempts to reach a server: doubled each time.
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.02, 0.5
#: Before a server that knows no heartbeats is asked whether it does now.
_MUTE_S = 5.0


@dataclass(frozen=True, slots=True)
class Detection:
    """When a device counts as dead.

    Attributes:
        interval_s: between heartbeats.
        dead_after_s: of a server of which nothing was heard for so long.
        failed_requests, of_last: of a device that did not answer so many of the last requests in time.

    Raises:
        InvalidValue: on construction, where values do not do, or not together.
    """

    interval_s: float = 0.25
    dead_after_s: float = 2.0
    failed_requests: int = 3
    of_last: int = 5

    def __post_init__(self) -> None:
        if self.interval_s < 0.001:
            raise InvalidValue(f"heartbeats cannot come every {self.interval_s:g} s; at most every millisecond")
        if self.dead_after_s < 2 * self.interval_s:
            raise InvalidValue(
                f"a server with a heartbeat every {self.interval_s:g} s cannot be dead after {self.dead_after_s:g} s; "
                f"two intervals are the least"
            )
        if not 1 <= self.failed_requests <= self.of_last:
            raise InvalidValue(f"{self.failed_requests} of the last {self.of_last} requests cannot fail")


DEFAULT_DETECTION = Detection()


class Requests:
    """Which of the last requests to a device were answered in time."""

    def __init__(self, detection: Detection) -> None:
        self._detection = detection
        self._failures: deque[bool] = deque(maxlen=detection.of_last)

    def __str__(self) -> str:
        return f"{sum(self._failures)} of the last {len(self._failures)} requests"

    def note(self, *, answered: bool) -> bool:
        """One more; returns whether too many have failed by now."""
        if answered and not self._failures:  # as nearly always
            return False
        self._failures.append(not answered)
        if not any(self._failures):
            self._failures.clear()
        return sum(self._failures) >= self._detection.failed_requests

    def forget(self) -> None:
        """The device is as good as new."""
        self._failures.clear()


@dataclass(frozen=True, slots=True)
class ProcessState:
    """What the system says of a process of this host.

    Attributes:
        letter: R runs or could, S and D wait, T is stopped, Z and X have ended.
        cpu_ticks: processor time that it has had.
    """

    letter: str
    cpu_ticks: int

    @classmethod
    def of_stat(cls, text: str) -> ProcessState:
        """From Linux's /proc/PID/stat. Raises ValueError, IndexError."""
        fields = text[text.rindex(")") + 2 :].split()  # the name before may hold anything
        return cls(fields[0], int(fields[11]) + int(fields[12]))

    @property
    def has_ended(self) -> bool:
        return self.letter in "ZX"

    def computes_since(self, before: ProcessState | None) -> bool:
        """Whether it computes, or waits for a processor."""
        if self.letter in "TtZX":
            return False
        return self.letter == "R" or (before is not None and self.cpu_ticks > before.cpu_ticks)


class Pulse:
    """Decides by what is heard of a server, and when, whether it is dead.

    Args:
        look: what the system says of the server's process; None where it is on another host.
        clock: seconds.
    """

    def __init__(
        self,
        detection: Detection,
        look: Callable[[], ProcessState | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._detection = detection
        self._look = look
        self._clock = clock
        self._heard_s = self._counted_to_s = clock()
        self._counted_s = 0.0
        self._before: ProcessState | None = None
        #: Longest time between two signs of life so far.
        self.longest_silence_s = 0.0

    @property
    def silent_s(self) -> float:
        """Time since the last sign of life."""
        return self._clock() - self._heard_s

    def heard(self) -> None:
        """A sign of life has come."""
        now = self._clock()
        self.longest_silence_s = max(self.longest_silence_s, now - self._heard_s)
        self._heard_s = self._counted_to_s = now
        self._counted_s = 0.0
        self._before = None

    def tick(self) -> bool:
        """To be called every interval. Returns whether the server is dead."""
        now = self._clock()
        self._counted_s += min(now - self._counted_to_s, _LONGEST_TICK * self._detection.interval_s)
        self._counted_to_s = now
        dead_after_s = self._detection.dead_after_s
        if self._counted_s < dead_after_s:
            if self._before is None and self._counted_s >= dead_after_s / 2:
                self._before = self._look()
            return False
        if self._counted_s >= _PATIENCE * dead_after_s:
            return True
        state = self._look()
        return state is None or not state.computes_since(self._before)


class WatchedServer(Protocol):
    """What `Watch` needs of a device server. Methods of the same names in `ServerHandle`.

    Attributes:
        beat: its last heartbeat.
        on_answer: to be called when it has answered something.
    """

    beat: pb.HeartbeatResponse
    on_answer: Callable[[], None]

    @property
    def owes(self) -> bool: ...
    async def refresh(self) -> None: ...
    def give_up(self, why: str, after_s: float) -> None: ...


class Signs(Protocol):
    """How signs of life of a server come."""

    def listen(self, interval_s: float) -> AsyncGenerator[pb.HeartbeatResponse, None]:
        """Heartbeats over a connection of their own, until the server is stopped.

        Raises:
            Unavailable, OperationTimeout, OperationAborted: the connection cannot be made, or broke.
            DsmlError: the server knows no heartbeats.
        """

    async def nobody_listens(self) -> bool:
        """Whether the host answers that nobody listens at the server's address."""

    def look(self) -> ProcessState | None:
        """See `Pulse`."""


class Watch:
    """Follows one device server: tells it to give up its devices when it is dead, and to refresh when it is back.

    Use: construct, `start`, then `await stop()`; all from one event loop.
    """

    def __init__(
        self, server: WatchedServer, signs: Signs, detection: Detection, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._server = server
        self._signs = signs
        self._detection = detection
        self.pulse = Pulse(detection, signs.look, clock)
        server.on_answer = self.pulse.heard
        self._mute = False
        self._known = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stream: asyncio.Task[None] | None = None
        self._refreshing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to listen."""
        self._spawn(self._listen())
        self._spawn(self._count())

    async def stop(self) -> None:
        """Ends all that it does. Idempotent."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def look_now(self) -> None:
        """Something has ended that ends with the server's process."""
        self._spawn(self._look_whether_gone())

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None and not isinstance(failure, DsmlError):
            log.error("watching %s met a defect", self._server, exc_info=failure)

    async def _listen(self) -> None:
        delay_s = 0.0
        while True:
            self._known = False
            self._stream = self._spawn(self._follow())
            await asyncio.wait([self._stream])
            if self._known:
                delay_s = 0.0
            if self._stream.cancelled():  # it was silent for too long
                continue
            delay_s = min(max(2 * delay_s, _FIRST_DELAY_S), _LONGEST_DELAY_S)
            failure = self._stream.exception()
            if failure is None:
                self._give_up("is gone: its server was stopped")
            elif isinstance(failure, (Unavailable, OperationTimeout, OperationAborted)):
                while await self._look_whether_gone():  # which costs less than a connection that comes to nothing
                    await asyncio.sleep(delay_s)
                    delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
            elif isinstance(failure, DsmlError):
                self._mute = True
                log.info("%s sends no heartbeats: %s", self._server, failure)
                delay_s = _MUTE_S
            await asyncio.sleep(delay_s)

    async def _follow(self) -> None:
        async with aclosing(self._signs.listen(self._detection.interval_s)) as beats:
            async for beat in beats:
                self.pulse.heard()
                self._mute = False
                self._server.beat = beat
                # After the first one of a stream, so that it is the process of the stream that answers.
                if (not self._known or self._server.owes) and self._refreshing is None:
                    self._refreshing = self._spawn(self._refresh())

    async def _refresh(self) -> None:
        try:
            await self._server.refresh()
            self._known = True
        except DsmlError as error:
            log.debug("%s sends heartbeats, but: %s", self._server, error)  # the next one is the next chance
        finally:
            self._refreshing = None

    async def _count(self) -> None:
        lost_ticks = 0
        while True:
            await asyncio.sleep(self._detection.interval_s)
            if self._mute:
                continue
            if not self.pulse.tick():
                lost_ticks = 0
                continue
            state = self._signs.look()
            ended = state is not None and state.has_ended
            self._give_up("is gone: its process has ended" if ended else "")
            # A connection over which nothing came for long may be dead where a new one would not be.
            lost_ticks += 1
            if lost_ticks * self._detection.interval_s >= self._detection.dead_after_s and self._stream is not None:
                lost_ticks = 0
                self._stream.cancel()

    async def _look_whether_gone(self) -> bool:
        gone = await self._signs.nobody_listens()
        if gone:
            self._give_up("is gone: its process has ended")
        return gone

    def _give_up(self, why: str) -> None:
        silent_s = self.pulse.silent_s
        self._server.give_up(why or f"has sent no heartbeat for {silent_s:.1f} s", silent_s)
