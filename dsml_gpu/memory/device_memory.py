"""What arenas, transports and the executor ask of a device's memory, whatever it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dsml_gpu.memory.shared import SharedHandle

if TYPE_CHECKING:
    from dsml_gpu.memory.staging import Staging

#: A one-dimensional uint8 array in device memory: numpy.ndarray or cupy.ndarray. CuPy cannot be imported everywhere, so its
#: type has no name here.
DeviceNDArray = Any
#: Bytes in host memory.
HostBytes = bytes | memoryview | np.ndarray
#: A point in the work queued on a device; None where work is done at once.
Mark = Any


class Download(Protocol):
    """A copy to the host under way."""

    async def wait(self) -> np.ndarray:
        """The bytes, once they are there; valid until `release`."""

    def release(self) -> None:
        """The bytes are not needed any more. May be called before `wait`, and twice."""


class Staged(Protocol):
    """Host bytes in device memory, for a kernel to read."""

    @property
    def array(self) -> DeviceNDArray:
        """As long as the bytes."""

    def release(self) -> None:
        """All work that reads `array` is queued. May be called twice."""


class DeviceMemory(Protocol):
    """The memory of one device, and the work queued on it.

    What is queued runs in the order of the calls; a method that copies to or from the host waits for what was queued before
    it, and what is queued after it waits for the copy. Calls come from one event loop.

    Attributes:
        lends_staged: `stage` gives memory that is used again after `release`; otherwise it is the bytes themselves.
        has_staging: an arena of `allocate_arena` has a staging behind it (`memory.staging`), which outlives the process.
    """

    @property
    def lends_staged(self) -> bool: ...

    @property
    def has_staging(self) -> bool: ...

    def allocate(self, nbytes: int) -> DeviceNDArray:
        """Zeroed memory. Raises MemoryError."""

    def allocate_arena(self, nbytes: int) -> DeviceNDArray:
        """As `allocate`, where possible such that other processes can open it. Called once at most."""

    def share(self) -> SharedHandle:
        """What other processes open the arena with. Raises MemoryNotShared."""

    def open_shared(self, handle: SharedHandle) -> DeviceNDArray:
        """The arena of a device of another process, where this device's kernels read and write it.

        Raises:
            MemoryNotShared: it cannot be opened from here; the message says why.
        """

    def staging(self) -> Staging:
        """What is behind the arena. Raises MemoryNotShared where there is nothing."""

    def open_staging(self, handle: SharedHandle) -> Staging:
        """What is behind the arena of a device of another process. Raises MemoryNotShared as `open_shared`."""

    def give_back_staging(self) -> None:
        """Gives the memory of results that were staged back to the system. Nobody may need them."""

    def move_arena(self) -> DeviceNDArray:
        """Takes the arena's contents to fresh memory, which nobody else has open; gives the arena that is used from now on.

        Nothing may be queued or under way. Raises MemoryError.
        """

    def copy(self, target: DeviceNDArray, source: DeviceNDArray) -> None:
        """Queues a copy inside device memory."""

    def clone(self, source: DeviceNDArray) -> DeviceNDArray:
        """Queues a copy into memory of its own. Raises MemoryError."""

    def scratch(self, nbytes: int) -> DeviceNDArray:
        """Memory of undefined content, for work queued from now on. Raises MemoryError."""

    def near(self, array: DeviceNDArray) -> DeviceNDArray:
        """The same bytes where this device's kernels can read them: the array itself, or a copy from another GPU."""

    async def write(self, target: DeviceNDArray, data: HostBytes) -> None:
        """Queues a copy from the host; `data` may change as soon as this returns."""

    async def stage(self, data: HostBytes) -> Staged:
        """Queues a copy of host bytes to where kernels can read them; `data` must not change before `Staged.release`."""

    def begin_download(self, source: DeviceNDArray) -> Download:
        """Queues a copy to the host and returns at once; `source` must not change before `Download.wait` has returned."""

    def mark(self) -> Mark:
        """All work queued so far, for another device's `wait`."""

    def wait(self, mark: Mark) -> None:
        """What is queued from now on runs after the work of `mark`."""

    async def finish(self) -> None:
        """Returns when all queued work is done, but for downloads, which have a `wait` of their own.

        Raises:
            InternalError: something went wrong with it.
        """
