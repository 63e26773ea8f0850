"""Stream order: work on a device runs in the order in which it was issued."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Protocol

from dsml_gpu.errors import OperationTimeout


class Ordered(Protocol):
    """Something whose work is ordered; None before its first."""

    last_work: asyncio.Future[None] | None


class Turn:
    """A place in the order of work on some devices.

    The place is taken when the object is made, on all devices together, so two operations on the same devices can never
    wait for each other. ``async with turn:`` waits for all that was issued earlier on any of them. A turn must be ended,
    by the context or by `end`, or what comes later waits out its timeout.

    Args:
        devices: whose work it is.
        timeout_s: how long to wait for earlier work.
    """

    def __init__(self, devices: Iterable[Ordered], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._earlier: set[asyncio.Future[None]] = set()
        for device in devices:
            if device.last_work is not None and not device.last_work.done():
                self._earlier.add(device.last_work)
            device.last_work = self._ended

    async def __aenter__(self) -> None:
        """Raises OperationTimeout where earlier work does not end in time."""
        try:
            if self._earlier:
                # The futures are others' too: `wait` does not cancel them when this task is cancelled.
                _, unfinished = await asyncio.wait(self._earlier, timeout=self._timeout_s)
                if unfinished:
                    raise OperationTimeout(f"earlier work on the devices did not end within {self._timeout_s:g} s")
        except BaseException:
            self.end()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """Ends the turn. One given up while it waited ends with what it waited for, so nothing overtakes. Idempotent."""
        remaining = {work for work in self._earlier if not work.done()}
        if not remaining:
            if not self._ended.done():
                self._ended.set_result(None)
            return
        for work in remaining:
            work.add_done_callback(lambda _: self.end())
