"""Reduction operators: one record each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dsml_gpu.errors import InvalidValue


@dataclass(frozen=True, slots=True)
class Operator:
    """A reduction operator.

    Attributes:
        name: name in ``enum ReduceOp``.
        ufunc: name of the binary function in numpy and in CuPy.
        averages: divide the complete sum by the number of ranks.
    """

    name: str
    ufunc: str
    averages: bool = False


#: In the order of the wire's numbers.
OPERATORS: tuple[Operator, ...] = (
    Operator("SUM", "add"),
    Operator("PROD", "multiply"),
    Operator("MIN", "minimum"),  # numpy's minimum and maximum propagate NaN, fmin and fmax would not
    Operator("MAX", "maximum"),
    Operator("AVG", "add", averages=True),
)


def operator_of(wire_number: int) -> Operator:
    """The operator of a number of ``enum ReduceOp``.

    Raises:
        InvalidValue: no such operator.
    """
    if not 0 <= wire_number < len(OPERATORS):
        known = ", ".join(f"{number} {operator.name}" for number, operator in enumerate(OPERATORS))
        raise InvalidValue(f"unknown reduction operator {wire_number}; known: {known}")
    return OPERATORS[wire_number]


def reduce_into(xp: Any, operator: Operator, accumulator: Any, incoming: Any, divisor: int = 1) -> None:
    """``accumulator = operator(accumulator, incoming)``, in place, then divided by `divisor`.

    The order of the operands is fixed, so results are the same bits whatever the timing. Integer sums wrap and integer
    averages truncate toward zero, as NCCL's do; float16 and bfloat16 compute in float32 and round once.

    Args:
        xp: numpy or CuPy.
        accumulator, incoming: one-dimensional arrays of the same type and length; `incoming` may be unaligned.
        divisor: above 1 only with the reduction that completes an average.
    """
    combine = getattr(xp, operator.ufunc)
    with np.errstate(all="ignore"):  # overflow to infinity and NaN are results, not warnings
        if divisor == 1:
            combine(accumulator, incoming, out=accumulator)
        elif accumulator.dtype.kind in "iu":
            combine(accumulator, incoming, out=accumulator)
            accumulator[...] = _truncating_divide(xp, accumulator, divisor)
        elif accumulator.dtype.itemsize == 2:
            # The types' own operators would round the sum and then the quotient.
            wide = combine(accumulator.astype(xp.float32), incoming.astype(xp.float32))
            accumulator[...] = xp.divide(wide, wide.dtype.type(divisor)).astype(accumulator.dtype)
        else:
            combine(accumulator, incoming, out=accumulator)
            xp.divide(accumulator, accumulator.dtype.type(divisor), out=accumulator)


def _truncating_divide(xp: Any, array: Any, divisor: int) -> Any:
    if array.dtype.itemsize < 4:  # a divisor may not fit the type itself: int8 on 200 ranks
        array = array.astype(xp.int32)
    divisor = array.dtype.type(divisor)
    # floor_divide rounds toward minus infinity; what fmod leaves has the dividend's sign, so without it both agree.
    return xp.floor_divide(array - xp.fmod(array, divisor), divisor)
