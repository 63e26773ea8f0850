"""Keeping memory of messages for the next ones, and giving it back to the system when many have passed.

gRPC takes and frees the memory of a message in many pieces, and glibc keeps most of it for the process: after copies of
1 GiB a server would hold on to hundreds of MiB that it does not use. A slice of a collective, on the other hand, glibc may
give back to the system and take from it again each time, page by page.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from typing import Any

#: So many bytes of messages may pass before memory is given back.
_TRIM_AFTER_BYTES = 64 << 20
#: In the middle of a call, which may be a stream of any length, so many.
_TRIM_WITHIN_BYTES = 256 << 20
#: The last pieces are freed a little after a call has ended, and a burst of calls needs one trim, not one each.
_DELAY_S = 0.2


#: Parameters of glibc's mallopt, and what a server sets them to: freed pieces of up to so many bytes are kept for the next
#: ones, and so much at the end of the heap. Eight ranks of a ring over gRPC on two cores need 1.77 instead of 1.99 ns of
#: processor time for a byte (slices of 512 KiB), and a quarter of the page faults. With more, memory comes back too late.
_KEPT = {-3: 4 << 20, -1: 16 << 20}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD


def _glibc(name: str) -> Any:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # not glibc: macOS, musl
        return None


_malloc_trim: Callable[[int], int] | None = _glibc("malloc_trim")


def keep_freed_memory() -> None:
    """Lets this process keep freed memory until `MessageMemory` gives it back. For processes that are servers only."""
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        for parameter, nbytes in _KEPT.items():
            mallopt(parameter, nbytes)


class MessageMemory:
    """Counts the bytes of a server's messages and gives memory back when many have passed. Used from one event loop."""

    def __init__(self) -> None:
        self._passed = 0
        self._since_trim = 0
        self._timer: asyncio.TimerHandle | None = None

    def count(self, nbytes: int) -> None:
        """A message of so many bytes came or went."""
        self._passed += nbytes
        self._since_trim += nbytes
        # One that is due already is not put off: messages may come faster than it.
        if self._since_trim >= _TRIM_WITHIN_BYTES and self._timer is None:
            self._trim_soon()

    def call_ended(self) -> None:
        """A call is over; what its messages took can go."""
        # Also where a trim in its middle has come just before: the last messages were under way then.
        if self._passed >= _TRIM_AFTER_BYTES:
            self._passed = 0
            self._trim_soon()

    def _trim_soon(self) -> None:
        self._since_trim = 0
        if _malloc_trim is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(_DELAY_S, self._trim, loop, _malloc_trim)

    def _trim(self, loop: asyncio.AbstractEventLoop, malloc_trim: Callable[[int], int]) -> None:
        self._timer = None
        # In a thread: it takes some 0.1 s after 1 GiB.
        loop.run_in_executor(None, malloc_trim, 0)
