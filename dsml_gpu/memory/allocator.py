"""First-fit allocation inside an address range."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass

from dsml_gpu.errors import AllocationNotFound, InvalidValue, OutOfMemory
from dsml_gpu.memory.arena import check_range

#: As cudaMalloc: enough for any vector load.
ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class _Block:
    nbytes: int
    owner: int


class Allocator:
    """Hands out ranges of ``[min_addr, max_addr)``; keeps only addresses, touches no memory.

    Allocation is advice among those who use it: a client of the original contract writes where it likes.
    """

    def __init__(self, min_addr: int, max_addr: int) -> None:
        self._min_addr = min_addr
        self._max_addr = max_addr
        self._blocks: dict[int, _Block] = {}
        self._order: list[int] = []

    @property
    def allocated(self) -> int:
        """Bytes handed out."""
        return sum(block.nbytes for block in self._blocks.values())

    def malloc(self, nbytes: int, owner: int = 0) -> int:
        """The lowest address with `nbytes` free bytes behind it, aligned to `ALIGNMENT`.

        Args:
            owner: a number that `free_all` takes; 0 for none.

        Raises:
            OutOfMemory: no gap is large enough.
        """
        if nbytes <= 0:
            raise InvalidValue(f"an allocation must be at least 1 byte, not {nbytes}")
        start = _align(self._min_addr)
        for addr in self._order:
            if addr - start >= nbytes:
                break
            start = _align(addr + self._blocks[addr].nbytes)
        if start + nbytes > self._max_addr:
            total = self._max_addr - self._min_addr
            raise OutOfMemory(
                f"no gap of {nbytes} bytes in device memory of {total} bytes, of which {self.allocated} are allocated"
            )
        self._blocks[start] = _Block(nbytes, owner)
        insort(self._order, start)
        return start

    def malloc_at(self, addr: int, nbytes: int, owner: int = 0) -> int:
        """Allocates ``[addr, addr + nbytes)`` and nothing else; returns `addr`.

        Raises:
            AddressOutOfRange: it leaves the address range.
            OutOfMemory: something is there.
        """
        if nbytes <= 0:
            raise InvalidValue(f"an allocation must be at least 1 byte, not {nbytes}")
        check_range(addr, nbytes, self._min_addr, self._max_addr)
        for start in self._order[max(0, bisect_right(self._order, addr) - 1) :]:
            end = start + self._blocks[start].nbytes
            if start >= addr + nbytes:
                break
            if end > addr:
                raise OutOfMemory(f"{nbytes} bytes at {addr:#x} are not free: {start:#x} to {end:#x} is allocated")
        self._blocks[addr] = _Block(nbytes, owner)
        insort(self._order, addr)
        return addr

    def free(self, addr: int, owner: int = 0) -> None:
        """Gives a block back.

        Raises:
            AllocationNotFound: `addr` is not the start of a live block of `owner`.
        """
        block = self._blocks.get(addr)
        if block is None or block.owner != owner:
            raise AllocationNotFound(f"no allocation of owner {owner} starts at address {addr:#x}")
        del self._blocks[addr]
        del self._order[bisect_left(self._order, addr)]

    def free_all(self, owner: int) -> None:
        """Gives all blocks of one owner back."""
        for addr in [addr for addr, block in self._blocks.items() if block.owner == owner]:
            self.free(addr, owner)


def _align(addr: int) -> int:
    return -(-addr // ALIGNMENT) * ALIGNMENT
