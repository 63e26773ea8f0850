"""A bounded queue between two coroutines that either end can close with an error."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from dsml_gpu.errors import DsmlError

T = TypeVar("T")


class ClosableQueue(Generic[T]):
    """First in, first out; one producer and one consumer in one event loop.

    Unlike `asyncio.Queue`, `close` makes both ends raise the error at once, whatever they wait for.

    Args:
        depth: `put` waits while so many items lie here; 0: it never waits.

    Attributes:
        on_get: called with each item that is taken.
    """

    def __init__(self, depth: int = 0) -> None:
        self.on_get: Callable[[T], None] | None = None
        self._depth = depth
        self._items: deque[T] = deque()
        self._error: DsmlError | None = None
        self._changed: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    async def put(self, item: T) -> None:
        """Appends, when there is room. Raises the error of `close`."""
        while self._depth and len(self._items) >= self._depth and self._error is None:
            await self._wait()
        self.put_nowait(item)

    def put_nowait(self, item: T) -> None:
        """Appends, room or not. Raises the error of `close`."""
        if self._error is not None:
            raise self._error
        self._items.append(item)
        self._wake()

    async def get(self) -> T:
        """Takes the oldest item, when there is one. Raises the error of `close`."""
        while not self._items and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        item = self._items.popleft()
        self._wake()
        if self.on_get is not None:
            self.on_get(item)
        return item

    def peek(self) -> T | None:
        """The oldest item, which stays; None where there is none. Raises the error of `close`."""
        if self._error is not None:
            raise self._error
        return self._items[0] if self._items else None

    def close(self, error: DsmlError) -> None:
        """From now on both ends raise `error`; the first close counts. Items that were not taken are dropped."""
        if self._error is None:
            self._error = error
            self._items.clear()
            self._wake()

    async def _wait(self) -> None:
        # Producer and consumer never wait at the same time: one needs a full queue, the other an empty one.
        self._changed = asyncio.get_running_loop().create_future()
        await self._changed

    def _wake(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
