"""Keeping memory of messages for the next ones, and giving it back to the system when many have passed.

gRPC takes and frees the memory of a message in many pieces, and glibc keeps most of it for the process: after copies of
1 GiB a server would hold on to hundreds of MiB that it does not use. A slice of a collective, on the other hand, glibc may
give back to the system and take from it again each time, page by page.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Memory is given back when at least so many bytes of messages have passed...
_TRIM_AFTER_BYTES = 64 << 20
#: ... and then none for so long: what one of many operations has freed the next one takes, without a page fault...
_IDLE_S = 0.2
#: ... and once more after this time, for what gRPC's threads freed late.
_AGAIN_S = 2.0
#: Where messages never pause, memory is given back each time that so many bytes have passed.
_TRIM_WITHIN_BYTES = 256 << 20


#: Parameters of glibc's mallopt, and what a server sets them to. Freed pieces of up to 4 MiB are kept for the next ones,
#: and 16 MiB at the end of the heap: eight ranks of a ring over gRPC on two cores need 1.77 instead of 1.99 ns of processor
#: time for a byte (slices of 512 KiB), and a quarter of the page faults. And there is one heap, not one for each few
#: threads: what gRPC frees in one thread it takes in another, and each heap would keep its own share (35 MiB in all after
#: copies of 128 MiB, instead of 6).
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8
_KEPT = {_M_MMAP_THRESHOLD: 4 << 20, _M_TRIM_THRESHOLD: 16 << 20, _M_ARENA_MAX: 1}


def _glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # not glibc: macOS, musl
        return None


_malloc_trim: Callable[[int], int] | None = _glibc("malloc_trim")


def keep_freed_memory() -> None:
    """Lets this process keep freed memory until `MessageMemory` gives it back. For processes that are servers only.

    To be called before there are threads: heaps that exist stay.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        for parameter, nbytes in _KEPT.items():
            mallopt(parameter, nbytes)


class MessageMemory:
    """Counts the bytes of a server's messages and gives memory back when many have passed. Used from one event loop."""

    def __init__(self) -> None:
        self._passed = 0
        self._since_trim = 0
        self._last_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def count(self, nbytes: int) -> None:
        """A message of so many bytes came or went."""
        self._passed += nbytes
        self._since_trim += nbytes
        self._busy()
        if self._since_trim >= _TRIM_WITHIN_BYTES:
            self._trim()

    def call_ended(self) -> None:
        """A call is over; what its messages took can go."""
        self._busy()

    def _busy(self) -> None:
        if self._passed < _TRIM_AFTER_BYTES:
            return
        # Only noted: a timer made anew for each message would cost more than the rest of this class.
        self._last_s = asyncio.get_running_loop().time()
        if self._timer is None:
            self._look_in(_IDLE_S)

    def _look_in(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._look)

    def _look(self) -> None:
        remaining_s = self._last_s + _IDLE_S - asyncio.get_running_loop().time()
        if remaining_s > 0:
            self._look_in(remaining_s)
            return
        self._trim()
        if self._passed:
            self._passed = 0
            self._look_in(_AGAIN_S)
        else:
            self._timer = None

    def _trim(self) -> None:
        self._since_trim = 0
        _give_back()


class RegularTrim:
    """Gives memory back from time to time, whatever has passed. Used from one event loop.

    For a coordinator: many small messages, and what it remembers between them, leave gaps in the heap that grow for hours.

    Args:
        interval_s: between two times.
    """

    def __init__(self, interval_s: float = 30.0) -> None:
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """From now on, until `stop`."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._trim)

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _trim(self) -> None:
        _give_back()
        self.start()


def _give_back() -> None:
    if _malloc_trim is not None:
        with suppress(RuntimeError):  # the event loop is ending, and its threads have
            # In a thread: it takes some 0.1 s after 1 GiB.
            asyncio.get_running_loop().run_in_executor(None, _malloc_trim, 0)
