"""Device memory that is host memory: everything is done at once."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from dsml_gpu.errors import MemoryNotShared
from dsml_gpu.memory.device_memory import HostBytes, Mark
from dsml_gpu.memory.shared import SharedHandle, SharedRange, can_share, open_shared, open_staging
from dsml_gpu.memory.staging import HEADER_BYTES, Staging

_PAGE_BYTES = 4096
#: Of the staging, beyond the size of the arena: its header, and what is lost between results.
_MORE_STAGING_BYTES = 4 << 20


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
    has_staging = can_share()

    def __init__(self) -> None:
        self._shared: SharedRange | None = None
        self._staging: Staging | None = None

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
        # Address space only, until something is staged: the results of passes over the whole arena, and gaps between them.
        self._shared = SharedRange(nbytes, nbytes // _PAGE_BYTES * _PAGE_BYTES + _MORE_STAGING_BYTES)
        self._staging = Staging(self._shared.staging)
        self._staging.is_present = True
        return self._shared.array

    def share(self) -> SharedHandle:
        return self._arena().handle()

    def open_shared(self, handle: SharedHandle) -> np.ndarray:
        return open_shared(handle)

    def move_arena(self) -> np.ndarray:
        arena, staging = self._arena(), self.staging()
        staging.is_present = False  # where it was
        arena.move()
        staging.is_present = True
        return arena.array

    def staging(self) -> Staging:
        self._arena()
        assert self._staging is not None
        return self._staging

    def open_staging(self, handle: SharedHandle) -> Staging:
        return Staging(open_staging(handle))

    def give_back_staging(self) -> None:
        self._arena().give_back_staging(HEADER_BYTES)

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
