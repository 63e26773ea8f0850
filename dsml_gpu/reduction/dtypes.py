"""Element types by their names on the wire (``enum DataType``)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dsml_gpu.errors import CountNotMultiple, InvalidValue

#: Wire name -> numpy type, in the order of the wire's numbers.
DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT64": np.dtype("<f8"),
    "FLOAT32": np.dtype("<f4"),
    "FLOAT16": np.dtype("<f2"),
    "BFLOAT16": np.dtype(ml_dtypes.bfloat16),
    "INT8": np.dtype("i1"),
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "UINT32": np.dtype("<u4"),
    "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"),
}
_WIRE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(wire_number: int) -> np.dtype[Any]:
    """The numpy type of a number of ``enum DataType``.

    Raises:
        InvalidValue: no such type.
    """
    if not 0 <= wire_number < len(DTYPES):
        raise InvalidValue(f"unknown data type {wire_number}; known: {_numbered(DTYPES)}")
    return list(DTYPES.values())[wire_number]


def wire_dtype(dtype: Any) -> int:
    """The number in ``enum DataType`` of anything that numpy takes for a type.

    Raises:
        InvalidValue: a type that the wire has not.
    """
    resolved = np.dtype(dtype)
    name = _WIRE_NAMES.get(resolved)
    if name is None:
        raise InvalidValue(f"data type {resolved} has no place on the wire; known: {', '.join(map(str, _WIRE_NAMES))}")
    return list(DTYPES).index(name)


def elements_in(count: int, dtype: np.dtype[Any]) -> int:
    """Number of elements in `count` bytes.

    Raises:
        CountNotMultiple: it is not a whole number.
    """
    elements, rest = divmod(count, dtype.itemsize)
    if rest:
        raise CountNotMultiple(f"count is {count} bytes, expected a multiple of the {dtype.itemsize} bytes of {dtype}")
    return elements


def _numbered(names: Any) -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(names))
