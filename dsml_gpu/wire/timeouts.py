"""Waiting with a limit.

`asyncio.wait_for` will not do: before Python 3.12 it swallows a cancellation that comes together with the result, which is
how gRPC shows a stream whose other end has gone. `asyncio.timeout` is not there before Python 3.11.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dsml_gpu.errors import OperationTimeout

T = TypeVar("T")


class StallWatch:
    """Cancels the task that made it when a count stands still; `stalled` tells that it was this.

    Whoever makes one turns the cancellation into an error where `stalled` is set, and calls `stop` in any case.

    Args:
        timeout_s: how long it may stand still.
        count: the count.
    """

    def __init__(self, timeout_s: float, count: Callable[[], int]) -> None:
        self.stalled = False
        self._timeout_s = timeout_s
        self._count = count
        self._seen = count()
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout_s, self._look)

    def stop(self) -> None:
        """Ends the watch. Idempotent."""
        self._timer.cancel()
        if self.stalled and self._task is not None and sys.version_info >= (3, 11):
            self._task.uncancel()  # the cancellation was ours and became an error

    def _look(self) -> None:
        if self._count() == self._seen:
            self.stalled = True
            assert self._task is not None
            self._task.cancel()
            return
        self._seen = self._count()
        self._timer = self._loop.call_later(self._timeout_s, self._look)


async def in_time(step: Awaitable[T], timeout_s: float, what: str) -> T:
    """The result of `step`.

    Raises:
        OperationTimeout: it took longer; `what` says what was waited for.
    """
    watch = StallWatch(timeout_s, lambda: 0)
    try:
        return await step
    except asyncio.CancelledError:
        if watch.stalled:
            raise OperationTimeout(f"waited {timeout_s:g} s for {what}") from None
        raise
    finally:
        watch.stop()
