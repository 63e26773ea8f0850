"""Reductions against arithmetic that is not numpy's, element by element."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsml_gpu.errors import CountNotMultiple, InvalidValue
from dsml_gpu.reduction import DTYPES, OPERATORS, HostReducer, Operator, dtype_of, elements_in, operator_of, wire_dtype
from dsml_gpu.wire import gpu_sim_pb2 as pb

INTEGERS = [name for name, dtype in DTYPES.items() if dtype.kind in "iu"]
FLOATS = [name for name in DTYPES if name not in INTEGERS]
BY_NAME = {operator.name: operator for operator in OPERATORS}


def accumulate(operator: Operator, accumulator: np.ndarray, incoming: np.ndarray, divisor: int = 1) -> None:
    """In place, as a receiver does."""
    operands = accumulator.view(np.uint8), incoming.view(np.uint8)
    HostReducer().reduce(operator, accumulator.dtype, operands, operands[:1], divisor)


def wrapped(value: int, dtype: np.dtype) -> int:
    """Two's complement."""
    info = np.iinfo(dtype)
    span = 1 << info.bits
    return (value - int(info.min)) % span + int(info.min)


def truncated(numerator: int, denominator: int) -> int:
    return math.trunc(Fraction(numerator, denominator))


INTEGER_RULES = {
    "SUM": lambda a, b, n: a + b,
    "PROD": lambda a, b, n: a * b,
    "MIN": lambda a, b, n: min(a, b),
    "MAX": lambda a, b, n: max(a, b),
}


@pytest.mark.parametrize("dtype_name", INTEGERS)
@given(st.data())
def test_integers_wrap(dtype_name: str, data: st.DataObject) -> None:
    dtype = DTYPES[dtype_name]
    info = np.iinfo(dtype)
    values = st.lists(st.integers(int(info.min), int(info.max)), min_size=1, max_size=20)
    left = data.draw(values)
    right = data.draw(st.lists(st.integers(int(info.min), int(info.max)), min_size=len(left), max_size=len(left)))
    for name, rule in INTEGER_RULES.items():
        accumulator = np.array(left, dtype)
        accumulate(BY_NAME[name], accumulator, np.array(right, dtype))
        assert accumulator.tolist() == [wrapped(rule(a, b, 1), dtype) for a, b in zip(left, right, strict=True)]
    divisor = data.draw(st.integers(2, 300))
    accumulator = np.array(left, dtype)
    accumulate(BY_NAME["AVG"], accumulator, np.array(right, dtype), divisor)
    sums = [wrapped(a + b, dtype) for a, b in zip(left, right, strict=True)]
    assert accumulator.tolist() == [truncated(value, divisor) for value in sums]


def rounded(value: Fraction, dtype: np.dtype) -> float:
    """The nearest value of a float type, ties to even, from exact arithmetic."""
    info = ml_dtypes.finfo(dtype)
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    exponent = max(exponent, int(info.minexp))
    step = Fraction(2) ** (exponent - int(info.nmant))
    result = Fraction(round(value / step)) * step  # Python rounds ties of a Fraction to even
    return math.copysign(math.inf, value) if abs(result) > Fraction(float(info.max)) else float(result)


@pytest.mark.parametrize("dtype_name", FLOATS)
@given(st.data())
def test_floats_round_once_to_nearest_even(dtype_name: str, data: st.DataObject) -> None:
    dtype = DTYPES[dtype_name]
    number = st.integers(-4000, 4000).map(lambda i: np.array(i / 64).astype(dtype))
    left, right = data.draw(number), data.draw(number)
    a, b = Fraction(float(left)), Fraction(float(right))
    for name, exact in (("SUM", a + b), ("PROD", a * b), ("MIN", min(a, b)), ("MAX", max(a, b))):
        accumulator = np.array([left], dtype)
        accumulate(BY_NAME[name], accumulator, np.array([right], dtype))
        assert float(accumulator[0]) == rounded(exact, dtype), name


@pytest.mark.parametrize("dtype_name", ["FLOAT16", "BFLOAT16"])
def test_average_of_half_types_rounds_once(dtype_name: str) -> None:
    """1 + 3/256 needs more bits than bfloat16 has; rounded first, the average would be another number."""
    dtype = DTYPES[dtype_name]
    ulp = float(ml_dtypes.finfo(dtype).eps)
    left, right = np.array([1.0], dtype), np.array([1.5 + ulp], dtype)
    accumulate(BY_NAME["AVG"], left, right, 2)
    # The sum 2.5 + ulp is a tie there; the average 1.25 + ulp/2 is one too, and both go to even.
    assert float(left[0]) == rounded(Fraction(2.5 + ulp) / 2, dtype)
    thirds = np.array([1.0], dtype)
    accumulate(BY_NAME["AVG"], thirds, np.array([1.0 + ulp], dtype), 3)
    exact = np.float32(2.0 + ulp) / np.float32(3)
    assert float(thirds[0]) == rounded(Fraction(float(exact)), dtype)


@pytest.mark.parametrize("dtype_name", FLOATS)
def test_nan_and_infinity(dtype_name: str) -> None:
    dtype = DTYPES[dtype_name]
    nan, inf = math.nan, math.inf
    left, right = [nan, 1.0, inf, -inf, inf], [1.0, nan, -inf, 2.0, inf]
    expected = {
        "SUM": [nan, nan, nan, -inf, inf],
        "PROD": [nan, nan, -inf, -inf, inf],
        "MIN": [nan, nan, -inf, -inf, inf],
        "MAX": [nan, nan, inf, 2.0, inf],
    }
    for name, values in expected.items():
        accumulator = np.array(left, dtype)
        accumulate(BY_NAME[name], accumulator, np.array(right, dtype))
        np.testing.assert_array_equal(accumulator.astype(float), values, err_msg=name)


@pytest.mark.parametrize("dtype_name", list(DTYPES))
def test_incoming_may_be_unaligned(dtype_name: str) -> None:
    dtype = DTYPES[dtype_name]
    values = np.arange(1, 8).astype(dtype)
    shifted = np.frombuffer(b"x" + values.tobytes(), np.uint8)[1:].view(dtype)
    accumulator = values.copy()
    accumulate(BY_NAME["SUM"], accumulator, shifted)
    assert accumulator.astype(float).tolist() == [2, 4, 6, 8, 10, 12, 14]


def test_numbers_are_those_of_the_wire() -> None:
    assert list(DTYPES) == pb.DataType.keys()
    assert [operator.name for operator in OPERATORS] == pb.ReduceOp.keys()
    for name, number in pb.DataType.items():
        assert dtype_of(number) == DTYPES[name]
        assert wire_dtype(DTYPES[name]) == number
    for name, number in pb.ReduceOp.items():
        assert operator_of(number).name == name


def test_unknown_numbers_and_types_are_refused_with_what_is_known() -> None:
    with pytest.raises(InvalidValue, match="unknown data type 10; known: 0 FLOAT64, 1 FLOAT32"):
        dtype_of(10)
    with pytest.raises(InvalidValue, match="unknown reduction operator 5; known: 0 SUM, 1 PROD"):
        operator_of(5)
    with pytest.raises(InvalidValue, match="complex128 has no place on the wire"):
        wire_dtype(np.complex128)


def test_counts_are_whole_elements() -> None:
    assert elements_in(24, DTYPES["FLOAT64"]) == 3
    with pytest.raises(CountNotMultiple, match="count is 25 bytes, expected a multiple of the 8 bytes of float64"):
        elements_in(25, DTYPES["FLOAT64"])
