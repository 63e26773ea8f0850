"""A device's address space over one array, with every access checked against it."""

from __future__ import annotations

import numpy as np

from dsml_gpu.errors import AddressOutOfRange, MemoryNotShared, OutOfMemory
from dsml_gpu.memory.backend import Backend
from dsml_gpu.memory.device_memory import DeviceMemory, DeviceNDArray, Download, HostBytes
from dsml_gpu.memory.shared import SharedHandle
from dsml_gpu.memory.staging import Staging

#: Smallest device memory a client may rely on.
MIN_ARENA_BYTES = 4 << 20


class Arena:
    """The address range ``[min_addr, max_addr)`` over the memory of one device.

    The memory itself is taken at the first access, so an arena that nobody touches costs nothing on a GPU; on the host
    even then only the pages that are touched are committed.

    Args:
        nbytes: size, at least `MIN_ARENA_BYTES`.
        backend: where the memory is.
        min_addr: address of the first byte.
    """

    def __init__(self, nbytes: int, backend: Backend, min_addr: int = 0) -> None:
        if nbytes < MIN_ARENA_BYTES:
            raise ValueError(f"device memory must be at least {MIN_ARENA_BYTES} bytes, not {nbytes}")
        if not 0 <= min_addr <= min_addr + nbytes < 1 << 64:
            raise ValueError(f"addresses {min_addr:#x} + {nbytes} leave 64 bits")
        self.backend = backend
        self.min_addr = min_addr
        self.max_addr = min_addr + nbytes
        self._memory: DeviceMemory | None = None
        self._bytes: DeviceNDArray | None = None

    @property
    def nbytes(self) -> int:
        return self.max_addr - self.min_addr

    @property
    def memory(self) -> DeviceMemory:
        """The device's memory and the work queued on it."""
        if self._memory is None:
            self._memory = self.backend.open()
        return self._memory

    def check(self, addr: int, nbytes: int) -> None:
        """Raises AddressOutOfRange unless ``[addr, addr + nbytes)`` lies inside the arena."""
        check_range(addr, nbytes, self.min_addr, self.max_addr)

    def view(self, addr: int, nbytes: int) -> DeviceNDArray:
        """The bytes ``[addr, addr + nbytes)`` as a uint8 array over the arena itself, not a copy.

        Raises:
            AddressOutOfRange: the range leaves the arena.
            OutOfMemory: the first access, and the system has not that much memory.
        """
        self.check(addr, nbytes)
        start = addr - self.min_addr
        return self._taken()[start : start + nbytes]

    def _taken(self) -> DeviceNDArray:
        if self._bytes is None:
            try:
                self._bytes = self.memory.allocate_arena(self.nbytes)
            except MemoryError as error:
                raise OutOfMemory(f"device memory of {self.nbytes} bytes cannot be had: {error}") from error
        return self._bytes

    def share(self) -> SharedHandle:
        """What other processes open the memory with. On a GPU it is taken now.

        Raises:
            MemoryNotShared: they cannot.
            OutOfMemory: as `view`.
        """
        self._taken()
        return self.memory.share()

    @property
    def has_staging(self) -> bool:
        """Whether there is a `staging`."""
        return self.memory.has_staging

    @property
    def staging(self) -> Staging:
        """Where results of passes are staged. Raises MemoryNotShared where there is nothing, and OutOfMemory as `view`."""
        self._taken()
        return self.memory.staging()

    def move(self) -> None:
        """Takes the contents to fresh memory: who has opened the memory before reaches them no more.

        Nothing may use the memory meanwhile. Raises OutOfMemory where there is not enough for both.
        """
        if self._bytes is not None:
            try:
                self._bytes = self.memory.move_arena()
            except MemoryError as error:
                raise OutOfMemory(f"device memory of {self.nbytes} bytes cannot be moved: {error}") from error

    async def write(self, addr: int, data: HostBytes) -> None:
        """Queues a copy of host bytes into the arena; `data` may change as soon as this returns. Raises as `view`."""
        source = np.frombuffer(data, np.uint8)
        await self.memory.write(self.view(addr, source.size), source)

    def begin_read(self, addr: int, nbytes: int) -> Download:
        """Queues a copy of a range to the host, which must not change before it is there. Raises as `view`."""
        return self.memory.begin_download(self.view(addr, nbytes))

    def __repr__(self) -> str:
        state = "untouched" if self._bytes is None else "in use"
        return f"Arena({self.min_addr:#x}..{self.max_addr:#x}, {self.backend.name}, {state})"


class OpenedArena:
    """The memory of a device of another process, opened here.

    Args:
        array: what `DeviceMemory.open_shared` gave.
        min_addr: address of its first byte.
        staging: what `DeviceMemory.open_staging` gave; None: it has none.
    """

    def __init__(self, array: DeviceNDArray, min_addr: int, staging: Staging | None = None) -> None:
        self._array = array
        self._min_addr = min_addr
        self._staging = staging

    @property
    def has_staging(self) -> bool:
        """Whether there is a `staging`."""
        return self._staging is not None

    @property
    def staging(self) -> Staging:
        """Where results of its passes are staged. Raises MemoryNotShared where there is nothing."""
        if self._staging is None:
            raise MemoryNotShared("it has no staging")
        return self._staging

    def view(self, addr: int, nbytes: int) -> DeviceNDArray:
        """The bytes ``[addr, addr + nbytes)`` as a uint8 array. Raises AddressOutOfRange."""
        check_range(addr, nbytes, self._min_addr, self._min_addr + self._array.nbytes)
        start = addr - self._min_addr
        return self._array[start : start + nbytes]


def check_range(addr: int, nbytes: int, min_addr: int, max_addr: int) -> None:
    """Raises AddressOutOfRange unless ``[addr, addr + nbytes)`` lies inside ``[min_addr, max_addr)``.

    Python integers do not wrap, so ``addr + nbytes`` past 2**64 is out of range like any other.
    """
    if addr < min_addr or addr + nbytes > max_addr:
        raise AddressOutOfRange(f"address {addr:#x} + {nbytes} bytes is outside device memory {min_addr:#x}..{max_addr:#x}")
