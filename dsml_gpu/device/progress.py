"""How far the devices of a server have come, and the heartbeats that tell of it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable

from dsml_gpu.wire import gpu_sim_pb2 as pb

#: How often it is looked whether work has ended that the end of the heartbeats waits for.
_LOOK_S = 0.02


class Progress:
    """Of all devices of one server.

    Heartbeats come from the event loop in which the devices work, so a server whose loop stands still has none, also where
    threads of its process still answer on the network.

    Attributes:
        count: slices and passes done so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._ends = asyncio.Event()

    def add(self, number: int = 1) -> None:
        """A device has done so many slices or passes."""
        self.count += number

    async def beats(self, interval_s: float, executing: Callable[[], int]) -> AsyncGenerator[pb.HeartbeatResponse, None]:
        """A heartbeat at once and every `interval_s`; they end after `end`, when nothing is executed any more."""
        ends = asyncio.ensure_future(self._ends.wait())
        try:
            for number in itertools.count(1):
                yield pb.HeartbeatResponse(number=number, progress=self.count, executing=executing())
                await asyncio.wait([ends], timeout=interval_s)
                if ends.done():
                    if not executing():
                        return
                    await asyncio.sleep(min(interval_s, _LOOK_S))
        finally:
            ends.cancel()

    def end(self) -> None:
        """The server stops: heartbeats go on only as long as something is executed. Idempotent."""
        self._ends.set()
