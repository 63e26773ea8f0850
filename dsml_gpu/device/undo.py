"""What an operation overwrites, kept until it is certain that the operation has ended well on all ranks.

A rank that is done cannot know whether the others are. So it keeps what was in its buffers before, in memory of its own, and
brings it back when the coordinator says that the operation was given up. Memory is kept piece by piece, right before each
is written for the first time: there is no copy of the whole beforehand that everybody would wait for, and what a reduction
reads next is in the cache then.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass

from dsml_gpu.memory.device_memory import DeviceMemory, DeviceNDArray

#: After so long without an operation the memory for the next one's pieces goes back to the system.
_SPARE_S = 3.0


class SparePieces:
    """Memory that operations have kept pieces in, for those that follow: taken from the system anew, its pages cost more
    than what is copied into them.

    Args:
        memory: where it is taken.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        self.memory = memory
        self._spare: defaultdict[int, list[DeviceNDArray]] = defaultdict(list)
        self._timer: asyncio.TimerHandle | None = None
        self._used = False

    def take(self, nbytes: int) -> DeviceNDArray:
        """Memory of undefined content. Raises MemoryError."""
        spare = self._spare[nbytes]
        return spare.pop() if spare else self.memory.scratch(nbytes)

    def give_back(self, piece: DeviceNDArray) -> None:
        """Nobody needs the piece any more."""
        self._spare[piece.nbytes].append(piece)
        self._used = True
        if self._timer is None:
            self._wait()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_SPARE_S, self._look)

    def _look(self) -> None:
        if self._used:
            self._used = False
            self._wait()
        else:
            self._timer = None
            self._spare.clear()


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes of device memory (a view), and what they were."""

    place: DeviceNDArray
    content: DeviceNDArray


class Undo:
    """What one round of operations has overwritten in the memory of one device.

    Args:
        spare: where memory to keep it comes from.
    """

    def __init__(self, spare: SparePieces) -> None:
        self._spare = spare
        self._kept: list[_Kept] = []

    def keep(self, place: DeviceNDArray) -> None:
        """Keeps what a view of device memory holds, before it is overwritten. Raises MemoryError."""
        content = self._spare.take(place.nbytes)
        self._spare.memory.copy(content, place)
        self._kept.append(_Kept(place, content))

    async def roll_back(self) -> None:
        """Brings back what was kept. Returns when it is there. Idempotent.

        Nothing else may use the memory meanwhile.

        Raises:
            InternalError: from the device's memory.
        """
        # What was kept first is older.
        while self._kept:
            kept = self._kept.pop()
            self._spare.memory.copy(kept.place, kept.content)
        await self._spare.memory.finish()

    def forget(self) -> None:
        """What was overwritten is not needed any more. Idempotent."""
        while self._kept:
            self._spare.give_back(self._kept.pop().content)
