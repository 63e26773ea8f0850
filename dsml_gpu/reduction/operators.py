"""Reduction operators: one record each."""

from __future__ import annotations

from dataclasses import dataclass

from dsml_gpu.errors import InvalidValue


@dataclass(frozen=True, slots=True)
class Operator:
    """A reduction operator.

    Attributes:
        name: name in ``enum ReduceOp``.
        ufunc: name of the binary function in numpy.
        functor: name of the CUDA functor in kernels/operators.cuh.
        averages: divide the complete sum by the number of ranks.
    """

    name: str
    ufunc: str
    functor: str
    averages: bool = False


#: In the order of the wire's numbers.
OPERATORS: tuple[Operator, ...] = (
    Operator("SUM", "add", "Sum"),
    Operator("PROD", "multiply", "Prod"),
    Operator("MIN", "minimum", "Min"),  # numpy's minimum and maximum propagate NaN, fmin and fmax would not
    Operator("MAX", "maximum", "Max"),
    Operator("AVG", "add", "Avg", averages=True),
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
