"""Device memory that is host memory: everything is done at once."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from dsml_gpu.errors import MemoryNotShared
from dsml_gpu.memory.device_memory import HostBytes, Mark
from dsml_gpu.memory.shared import SharedHandle, SharedRange, can_share, open_shared


@dataclass(frozen=True, slots=True)
class _HostBytes:
    """See `Download` and `Staged`."""

    array: np.ndarray

    async def wait(self) -> np.ndarray:
        return self.array

    def release(self) -> None:
        pass


class HostMemory:
    """See `DeviceMemory`."""

    lends_staged = False

    def __init__(self) -> None:
        self._shared: SharedRange | None = None

    def allocate(self, nbytes: int) -> np.ndarray:
        """Pages are committed by the system when they are touched."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        # Linux: do not count the reservation against the commit limit. macOS never does, and has no such flag in `mmap`.
        flags |= getattr(mmap, "MAP_NORESERVE", 0)
        try:
            region = mmap.mmap(-1, nbytes, flags=flags)
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"cannot reserve {nbytes} bytes of address space: {error}") from error
        return np.frombuffer(region, dtype=np.uint8)

    def allocate_arena(self, nbytes: int) -> np.ndarray:
        if not can_share():
            return self.allocate(nbytes)
        self._shared = SharedRange(nbytes)
        return self._shared.array

    def share(self) -> SharedHandle:
        return self._arena().handle()

    def open_shared(self, handle: SharedHandle) -> np.ndarray:
        return open_shared(handle)

    def move_arena(self) -> np.ndarray:
        arena = self._arena()
        arena.move()
        return arena.array

    def _arena(self) -> SharedRange:
        if self._shared is None:
            raise MemoryNotShared("memory of this system cannot be shared between processes")
        return self._shared

    def copy(self, target: np.ndarray, source: np.ndarray) -> None:
        target[...] = source

    def clone(self, source: np.ndarray) -> np.ndarray:
        return np.array(source)

    def scratch(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def near(self, array: np.ndarray) -> np.ndarray:
        return array

    async def write(self, target: np.ndarray, data: HostBytes) -> None:
        target[...] = np.frombuffer(data, dtype=np.uint8)

    async def stage(self, data: HostBytes) -> _HostBytes:
        return _HostBytes(np.frombuffer(data, dtype=np.uint8))

    def begin_download(self, source: np.ndarray) -> _HostBytes:
        """A view: `source` must not change before it is used."""
        return _HostBytes(source)

    def mark(self) -> Mark:
        return None

    def wait(self, mark: Mark) -> None:
        pass

    async def finish(self) -> None:
        pass
