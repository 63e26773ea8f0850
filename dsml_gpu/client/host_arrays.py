"""Whatever a user calls an array, as a contiguous little-endian numpy array in host memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from dsml_gpu.errors import InvalidValue

_DLPACK_CPU = 1


def as_host_array(source: Any, dtype: Any = None) -> np.ndarray:
    """A C-contiguous, little-endian numpy array with the values of `source`; no copy where it is one already.

    Args:
        source: anything with ``__cuda_array_interface__`` (copied from the GPU; needs CuPy), DLPack, or ``__array__``, or
            nested sequences of numbers.
        dtype: convert to this type.

    Raises:
        InvalidValue: it is no array of numbers.
    """
    try:
        array = source if isinstance(source, np.ndarray) else _to_numpy(source)
        array = np.asarray(array, dtype=dtype)
    except (TypeError, ValueError, BufferError, RuntimeError) as error:
        raise InvalidValue(f"{type(source).__name__} is not an array of numbers: {error}") from error
    if array.dtype.hasobject:
        raise InvalidValue(f"{type(source).__name__} of type {array.dtype} is not an array of numbers")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).reshape(array.shape)


def _to_numpy(source: Any) -> Any:
    if hasattr(source, "__cuda_array_interface__"):
        return _cupy().asnumpy(source)
    if hasattr(source, "__dlpack_device__"):
        if source.__dlpack_device__()[0] == _DLPACK_CPU:
            return np.from_dlpack(source)
        return _cupy().asnumpy(_cupy().from_dlpack(source))
    return source


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise InvalidValue("an array in GPU memory can be read only where CuPy is installed") from error
    return cupy
