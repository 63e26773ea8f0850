"""The array module that holds device memory, and the choice between numpy and CuPy.

Everything that differs between the two is in this file; arenas, reductions and transports are written once over `Backend`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

#: An array of `Backend.xp`: numpy.ndarray or cupy.ndarray. CuPy cannot be imported everywhere, so its type has no name here.
DeviceNDArray = Any


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Backend:
    """An array module and the few things numpy and CuPy do differently.

    Attributes:
        name: ``"numpy"`` or ``"cupy"``.
        device_name: what the memory is, for people.
        xp: the array module.
        allocate: bytes -> one-dimensional uint8 array. Raises MemoryError.
        to_host: device array -> numpy array; a view where the memory is host memory already.
        from_host: numpy array -> device array that a ufunc of `xp` accepts; a view where possible.
        synchronize: returns when all work queued on the device is done.
        computes: whether `xp` can compute on these bytes as this type; where not, the host does.
    """

    name: str
    device_name: str
    xp: Any
    allocate: Callable[[int], DeviceNDArray]
    to_host: Callable[[DeviceNDArray], np.ndarray]
    from_host: Callable[[np.ndarray], DeviceNDArray]
    synchronize: Callable[[], None]
    computes: Callable[[DeviceNDArray, np.dtype[Any]], bool]


def _reserve_host_memory(nbytes: int) -> np.ndarray:
    """Zeroed host memory whose pages the system commits only when they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    # Linux: do not count the reservation against the commit limit. macOS never does, and has no such flag in `mmap`.
    flags |= getattr(mmap, "MAP_NORESERVE", 0)
    try:
        region = mmap.mmap(-1, nbytes, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"cannot reserve {nbytes} bytes of address space: {error}") from error
    return np.frombuffer(region, dtype=np.uint8)


NUMPY = Backend(
    name="numpy",
    device_name="host memory",
    xp=np,
    allocate=_reserve_host_memory,
    to_host=lambda array: array,
    from_host=lambda array: array,
    synchronize=lambda: None,
    computes=lambda array, dtype: True,
)


def _cupy() -> Backend:
    try:
        import cupy as cp
    except ImportError as error:
        raise BackendUnavailable(f"CuPy is not installed ({error}); pip install 'dsml-gpu[cuda13]' or [cuda12]") from error
    try:
        gpus = cp.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise BackendUnavailable(f"CuPy {cp.__version__} finds no usable CUDA driver ({error})") from error
    if gpus == 0:
        raise BackendUnavailable(f"CuPy {cp.__version__} finds no GPU")

    def allocate(nbytes: int) -> DeviceNDArray:
        try:
            return cp.zeros(nbytes, dtype=cp.uint8)
        except cp.cuda.memory.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error

    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    return Backend(
        name="cupy",
        device_name=properties["name"].decode(),
        xp=cp,
        allocate=allocate,
        to_host=cp.asnumpy,
        from_host=cp.asarray,
        synchronize=cp.cuda.get_current_stream().synchronize,
        # A GPU faults on unaligned access, and CuPy's ufuncs know no bfloat16.
        computes=lambda array, dtype: array.data.ptr % dtype.itemsize == 0 and dtype.kind in "iuf",
    )


def select_backend(name: str) -> tuple[Backend, str]:
    """The backend for ``auto``, ``numpy`` or ``cupy``, and one line that says which it is and why.

    Raises:
        BackendUnavailable: ``cupy`` was asked for and cannot run here.
        ValueError: another name.
    """
    if name == "numpy":
        return NUMPY, "numpy, as asked"
    if name == "cupy":
        backend = _cupy()
        return backend, f"CuPy on {backend.device_name}, as asked"
    if name == "auto":
        try:
            backend = _cupy()
        except BackendUnavailable as reason:
            return NUMPY, f"numpy, because {reason}"
        return backend, f"CuPy, because {backend.device_name} answers"
    raise ValueError(f"backend must be auto, numpy or cupy, not {name!r}")
