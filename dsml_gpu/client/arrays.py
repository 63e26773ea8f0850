"""Devices and arrays in their memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any

import numpy as np

from dsml_gpu.client.host_arrays import as_host_array
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.client.shared_copies import SharedCopies
from dsml_gpu.errors import AllocationNotFound, DsmlError, InvalidValue, PeerUnavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb


class Device:
    """One device of a coordinator, as a client sees it.

    Attributes:
        device_id: its id.
        address: host:port of its server.
        backend: ``"numpy"`` or ``"cupy"``.
        name: what its memory is, for people.
        min_addr, max_addr: its address range; `max_addr` is one past the last byte.
        metadata: all that its server says of it.
    """

    def __init__(
        self,
        connection: CoordinatorConnection,
        metadata: pb.DeviceMetadata,
        comm_id: int = 0,
        has_ended: Callable[[], bool] = lambda: False,
    ) -> None:
        self._connection = connection
        self._comm_id = comm_id
        self._has_ended = has_ended  # the communicator that this device, and what is allocated on it, belongs to
        #: The communicator goes on without it. Whoever has its id now may have other things at its addresses.
        self.is_behind = False
        self.become(metadata)

    def become(self, metadata: pb.DeviceMetadata) -> None:
        """Another device has taken the place of this one, with what is in its memory."""
        self.metadata = metadata
        self.device_id: int = metadata.deviceId.value
        self.address: str = metadata.address
        self.backend: str = metadata.backend
        self.name: str = metadata.deviceName
        self.min_addr: int = metadata.minMemAddr.value
        self.max_addr: int = metadata.maxMemAddr.value
        self._shared = SharedCopies(self._connection, self.device_id, self.backend)

    @property
    def identity(self) -> tuple[int, str]:
        """Which device it is, in which process: one whose server was restarted is another one, and empty."""
        return self.device_id, self.metadata.processUid

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float64) -> DeviceArray:
        """A new array; its contents are undefined.

        Raises:
            OutOfMemory: the device has no room for it.
        """
        resolved = np.dtype(dtype).newbyteorder("<")
        dimensions = tuple(map(operator.index, shape if isinstance(shape, Iterable) else (shape,)))
        nbytes = math.prod(dimensions) * resolved.itemsize
        request = pb.MallocRequest(deviceId=pb.DeviceId(value=self.device_id), numBytes=max(nbytes, 1), commId=self._comm_id)
        addr = self._connection.call("Malloc", request).memAddr.value
        return DeviceArray(self, addr, dimensions, resolved)

    def array(self, source: Any, dtype: Any = None) -> DeviceArray:
        """A new array with the values of `source`, which may be anything that `DeviceArray.set` takes.

        Raises:
            InvalidValue: `source` is no array of numbers.
            OutOfMemory: the device has no room for it.
        """
        host = as_host_array(source, dtype)
        result = self.empty(host.shape, host.dtype)
        try:
            result.set(host)
        except BaseException:
            with suppress(DsmlError):
                result.free()
            raise
        return result

    def _require_member(self) -> None:
        if self.is_behind:
            raise PeerUnavailable(
                f"device {self.device_id} was left behind by communicator {self._comm_id}; what it had for it is gone"
            )

    def _write(self, addr: int, data: np.ndarray) -> None:
        """Copies host bytes (a uint8 array) to device memory. Raises PeerUnavailable where that is not its own any more."""
        self._require_member()
        if not self._shared.write(addr, data):
            self._connection.write(self.device_id, addr, data)

    def _read(self, addr: int, out: np.ndarray) -> None:
        """Copies device memory to host memory (a uint8 array). Raises as `_write`."""
        self._require_member()
        if not self._shared.read(addr, out):
            self._connection.read(self.device_id, addr, out)

    def __repr__(self) -> str:
        return f"Device({self.device_id} at {self.address}, {self.backend}, {self.name})"


class DeviceArray:
    """An array in the memory of one device. Made by `Device.array`, `Device.empty` or `Communicator.array`.

    It ends with `free`, with its ``with`` block, or with the communicator it was made for.
    """

    def __init__(self, device: Device, addr: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.device = device
        self.addr = addr
        self.shape = shape
        self.dtype = dtype
        self._freed = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def set(self, source: Any) -> None:
        """Copies `source` to the device; it must have this array's shape, and is converted to its type.

        Ordered after every collective issued earlier on the device. Returns when the data is there.

        Args:
            source: anything with ``__array__``, DLPack or ``__cuda_array_interface__``, or nested sequences of numbers.

        Raises:
            InvalidValue: another shape, or no array of numbers.
        """
        self._require_alive()
        host = as_host_array(source, self.dtype)
        if host.shape != self.shape:
            raise InvalidValue(f"expected an array of shape {self.shape}, got {host.shape}")
        if host.nbytes:
            self.device._write(self.addr, host.reshape(-1).view(np.uint8))

    def get(self, out: np.ndarray | None = None) -> np.ndarray:
        """The values, as a numpy array in host memory.

        Ordered after every collective issued earlier on the device.

        Args:
            out: C-contiguous array of this shape and type that takes them; None for a new one.

        Raises:
            InvalidValue: `out` does not fit.
        """
        self._require_alive()
        if out is None:
            out = np.empty(self.shape, self.dtype)
        elif out.shape != self.shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise InvalidValue(
                f"out must be C-contiguous with shape {self.shape} and type {self.dtype}, not {out.shape} and {out.dtype}"
            )
        if out.nbytes:
            self.device._read(self.addr, out.reshape(-1).view(np.uint8))
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array in device memory cannot be had without a copy")
        return np.asarray(self.get(), dtype=dtype)

    def free(self) -> None:
        """Gives the memory back. Idempotent, also where it is not its own any more: the communicator has ended, or goes on
        without the device."""
        if self._freed or self.device._has_ended() or self.device.is_behind:
            return
        self._freed = True
        request = pb.FreeRequest(
            deviceId=pb.DeviceId(value=self.device.device_id),
            memAddr=pb.MemAddr(value=self.addr),
            commId=self.device._comm_id,
        )
        self.device._connection.call("Free", request)

    def __enter__(self) -> DeviceArray:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.free()

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of an array without dimensions")
        return self.shape[0]

    def __repr__(self) -> str:
        state = "freed" if self._freed else f"at {self.addr:#x} on device {self.device.device_id}"
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, {state})"

    def _require_alive(self) -> None:
        if self._freed:
            raise AllocationNotFound(f"{self!r} was freed")
        if self.device._has_ended():
            raise AllocationNotFound(f"{self!r} ended with its communicator")
