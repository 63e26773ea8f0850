"""What others are about to overwrite in a device's memory: kept as what it overwrites itself is (`undo`).

This is how passes are undone where results cannot be staged, because memory ends with its process (`memory.staging`).
"""

from __future__ import annotations

from collections.abc import Sequence

from dsml_gpu.device.undo import SparePieces, Undo
from dsml_gpu.memory.arena import Arena
from dsml_gpu.memory.device_memory import DeviceNDArray


class KeptRanges(Undo):
    """Ranges of a device's memory.

    Args:
        arena: the memory, which may move meanwhile.
        ranges: address and size of each.

    Raises:
        AddressOutOfRange: on construction, where one leaves the memory.
        MemoryError: there is not enough for them.
    """

    def __init__(self, arena: Arena, spare: SparePieces, ranges: Sequence[tuple[int, int]]) -> None:
        super().__init__(spare)
        self._arena = arena
        self._pieces = spare
        self._contents: list[tuple[int, DeviceNDArray]] = []
        for addr, nbytes in ranges:
            place = arena.view(addr, nbytes)
            content = spare.take(nbytes)
            arena.memory.copy(content, place)
            self._contents.append((addr, content))

    async def roll_back(self) -> None:
        while self._contents:
            addr, content = self._contents.pop()
            self._arena.memory.copy(self._arena.view(addr, content.nbytes), content)
        await self._arena.memory.finish()

    def forget(self) -> None:
        while self._contents:
            self._pieces.give_back(self._contents.pop()[1])
