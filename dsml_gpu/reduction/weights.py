"""Weights of a pre-multiplied sum: what each rank has is multiplied by its weight before it is added."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dsml_gpu.errors import InvalidValue


def checked_weight(weight: float, dtype: np.dtype[Any]) -> np.generic:
    """A weight as what data of a type is multiplied by: of its own type, or float32 for float16 and bfloat16.

    A weight of floats need not be finite. Every NaN becomes the usual one: some others would not survive being rounded to
    bfloat16 by `fast`.

    Raises:
        InvalidValue: for integers, it is no whole number, or none that the type has.
    """
    if dtype.kind not in "iu":
        with np.errstate(over="ignore"):  # what is too large for the type is infinite in it
            kind = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
            scalar: np.generic = kind.type(math.nan if math.isnan(weight) else weight)
        return scalar
    info = np.iinfo(dtype)
    if not math.isfinite(weight) or weight != int(weight):
        raise InvalidValue(f"a weight of {dtype} must be a whole number, not {weight}")
    if not info.min <= weight <= info.max:
        raise InvalidValue(f"a weight of {dtype} must be {info.min} to {info.max}, not {int(weight)}")
    whole: np.generic = dtype.type(int(weight))
    return whole
