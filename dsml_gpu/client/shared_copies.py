"""Copies to and from a device of the same host, through memory that this process has open as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.errors import MemoryNotShared
from dsml_gpu.memory.shared import SharedHandle, can_share, open_shared
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: Smaller copies are faster as one message, which needs no round of its own to hold the memory.
SMALLEST_BYTES = 256 << 10


class SharedCopies:
    """For one device. Thread-safe as its connection is.

    Args:
        backend: of the device; memory of a GPU is not opened.
    """

    def __init__(self, connection: CoordinatorConnection, device_id: int, backend: str) -> None:
        self._connection = connection
        self._device_id = device_id
        self._possible = backend == "numpy" and can_share()
        self._handle: SharedHandle | None = None
        self._memory: np.ndarray | None = None

    def write(self, addr: int, data: np.ndarray) -> bool:
        """Copies host bytes (a uint8 array) to the device; False where that is not possible this way.

        Raises:
            DsmlError: as of `CoordinatorConnection.write`.
        """

        def attempt(limit_s: float) -> bool:
            with self._held(addr, data.nbytes, True, limit_s) as memory:
                if memory is not None:
                    memory[...] = data
            return memory is not None

        return self._worth_it(data.nbytes) and self._until_answered(attempt, data.nbytes)

    def read(self, addr: int, out: np.ndarray) -> bool:
        """Copies from the device to host memory (a uint8 array); False where that is not possible this way.

        Raises:
            DsmlError: as of `CoordinatorConnection.read`.
        """

        def attempt(limit_s: float) -> bool:
            with self._held(addr, out.nbytes, False, limit_s) as memory:
                if memory is not None:
                    out[...] = memory
            return memory is not None

        return self._worth_it(out.nbytes) and self._until_answered(attempt, out.nbytes)

    def _until_answered(self, attempt: Callable[[float], bool], nbytes: int) -> bool:
        return self._connection.until_answered(attempt, self._connection.copy_timeout_s(nbytes))

    def _worth_it(self, nbytes: int) -> bool:
        return self._possible and nbytes >= SMALLEST_BYTES

    @contextmanager
    def _held(self, addr: int, nbytes: int, writes: bool, limit_s: float) -> Iterator[np.ndarray | None]:
        """A range of the device's memory, which nobody else touches meanwhile; None where it cannot be opened from here."""
        request = pb.HoldMemoryRequest(
            deviceId=pb.DeviceId(value=self._device_id), memAddr=pb.MemAddr(value=addr), numBytes=nbytes, writes=writes
        )
        try:
            with self._connection.hold(request, limit_s) as shared:
                start = addr - shared.minMemAddr.value
                yield self._opened(shared)[start : start + nbytes]
        except MemoryNotShared:
            self._possible = False  # and will not be: the other process, or this one, is elsewhere
            yield None

    def _opened(self, shared: pb.SharedMemory) -> np.ndarray:
        handle = SharedHandle.of_message(shared)
        # Kept open: page tables of a large memory take longer to make than a copy.
        if self._memory is None or handle != self._handle:
            self._memory = open_shared(handle)
            self._handle = handle
        return self._memory
