"""Waking coroutines at a time, to some 50 us, without a busy wait.

asyncio's own timers will not do for links of 100 us: where the loop waits by epoll it rounds every wait up to a whole
millisecond. Linux has timers that are file descriptors, which wake the loop like any other and in time; elsewhere (kqueue
on macOS) the loop's own timers are precise. A thread that waits for a condition variable and wakes the loop would work
everywhere, but later and at a higher price. 3000 waits of 50 us to 1 ms, one after the other, on an idle machine with two
cores and Linux 6, Python 3.11; how late (median, 99 %), and the CPU time of each:

    loop.call_at        590 us   1070 us   42 us
    thread              110 us    300 us   70 us
    timer descriptor     50 us    150 us   44 us
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import math
import os
import struct
import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Protocol

_TFD_TIMER_ABSTIME = 1


def _find_c_library() -> Any:
    """The C library where it has timer descriptors, else None. `os` has them only from Python 3.13 on."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):  # Windows
        return None
    return library if hasattr(library, "timerfd_create") else None


_c_library = _find_c_library()


class Alarm(Protocol):
    """Calls back once at a time; a later `arm` replaces an earlier one."""

    def arm(self, time_s: float) -> None: ...
    def close(self) -> None: ...


class DescriptorAlarm:
    """A timer descriptor that the event loop watches."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._descriptor: int = _c_library.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        _check(self._descriptor)
        loop.add_reader(self._descriptor, self._read)

    def arm(self, time_s: float) -> None:
        # All zero would switch it off; no time of a running machine is that.
        seconds, nanoseconds = divmod(math.ceil(time_s * 1e9), 10**9)
        setting = struct.pack("@4l", 0, 0, seconds, nanoseconds)
        _check(_c_library.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, setting, None))

    def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)

    def _read(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:  # armed again between the wake-up and now
            return
        self._ring()


class LoopAlarm:
    """The event loop's own timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None

    def arm(self, time_s: float) -> None:
        self.close()
        self._handle = self._loop.call_at(time_s, self._ring)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Timer:
    """Sets futures at their times. For one event loop; takes a descriptor at the first use, which `close` gives back.

    Args:
        alarm: what it waits by.
    """

    def __init__(
        self,
        alarm: Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Alarm] = (
            DescriptorAlarm if _c_library is not None else LoopAlarm
        ),
    ) -> None:
        self._make_alarm = alarm
        self._alarm: Alarm | None = None
        self._numbers = itertools.count()  # futures do not compare
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []

    def __len__(self) -> int:
        """How many futures wait; those that somebody else has ended do not."""
        return sum(not future.done() for _, _, future in self._waiting)

    def at(self, time_s: float) -> asyncio.Future[None]:
        """A future that is set at this time of `time.monotonic`, never before it. Whoever has it may end it earlier."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (time_s, next(self._numbers), future))
        if self._waiting[0][2] is future:
            if self._alarm is None:
                self._alarm = self._make_alarm(loop, self._ring)
            self._alarm.arm(time_s)
        return future

    def close(self) -> None:
        """Cancels the futures that still wait, and gives the descriptor back. Idempotent."""
        waiting, self._waiting = self._waiting, []
        for _, _, future in waiting:
            future.cancel()
        if self._alarm is not None:
            self._alarm.close()
            self._alarm = None

    def _ring(self) -> None:
        waiting, now_s = self._waiting, time.monotonic()
        while waiting and (waiting[0][0] <= now_s or waiting[0][2].done()):
            future = heappop(waiting)[2]
            if not future.done():
                future.set_result(None)
        if waiting and self._alarm is not None:
            self._alarm.arm(waiting[0][0])
