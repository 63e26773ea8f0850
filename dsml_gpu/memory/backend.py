"""Where device memory is: in host memory (numpy), or on one of the machine's GPUs (CuPy)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsml_gpu.memory.device_memory import DeviceMemory
from dsml_gpu.memory.host import HostMemory


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A place for device memory.

    Attributes:
        name: ``"numpy"`` or ``"cupy"``.
        device_name: what the memory is, for people.
        open: makes the memory of one more device there.
        gpu: number of the GPU, as CUDA counts them; 0 without one.
    """

    name: str
    device_name: str
    open: Callable[[], DeviceMemory]
    gpu: int = 0


NUMPY = Backend("numpy", "host memory", HostMemory)


def select_backends(name: str, gpus: Sequence[int] = ()) -> tuple[tuple[Backend, ...], str]:
    """The backends of a server's devices, one for each device.

    Args:
        name: ``"auto"``, ``"numpy"`` or ``"cupy"``.
        gpus: the GPU of each device; the same may stand several times. Empty: one device per GPU, or one of numpy.

    Returns:
        The backends, and one line that says which they are and why.

    Raises:
        BackendUnavailable: CuPy or a GPU was asked for and cannot be had here.
        ValueError: another name, a GPU that the machine has not, or GPUs for numpy.
    """
    if name not in ("auto", "numpy", "cupy"):
        raise ValueError(f"backend must be auto, numpy or cupy, not {name!r}")
    if name == "numpy":
        if gpus:
            raise ValueError(f"the numpy backend uses no GPU, but GPU {gpus[0]} is asked for")
        return (NUMPY,), "numpy, as asked"
    try:
        backends = _cupy_backends(gpus)
    except BackendUnavailable as reason:
        if name == "cupy" or gpus:
            raise
        return (NUMPY,), f"numpy, because {reason}"
    names = " and ".join(dict.fromkeys(backend.device_name for backend in backends))
    why = f"CuPy on {names}, as asked" if name == "cupy" or gpus else f"CuPy, because {names} answers"
    return backends, why


def _cupy_backends(gpus: Sequence[int]) -> tuple[Backend, ...]:
    cp, count = _cupy()
    for gpu in gpus:
        if not 0 <= gpu < count:
            raise ValueError(f"there is no GPU {gpu}; this machine has {count}, numbered from 0")
    from dsml_gpu.memory.cuda import CudaMemory

    return tuple(
        Backend("cupy", cp.cuda.runtime.getDeviceProperties(gpu)["name"].decode(), partial(CudaMemory, gpu), gpu)
        for gpu in gpus or range(count)
    )


def _cupy() -> tuple[Any, int]:
    """CuPy, and how many GPUs it finds."""
    try:
        import cupy as cp
    except ImportError as error:
        raise BackendUnavailable(f"CuPy is not installed ({error}); pip install 'dsml-gpu[cuda13]' or [cuda12]") from error
    try:
        count = int(cp.cuda.runtime.getDeviceCount())
    except Exception as error:
        raise BackendUnavailable(f"CuPy {cp.__version__} finds no usable CUDA driver ({error})") from error
    if count == 0:
        raise BackendUnavailable(f"CuPy {cp.__version__} finds no GPU")
    return cp, count
