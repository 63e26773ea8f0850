"""N sources into D destinations against exact arithmetic, element by element: numpy's functions and compiled loops alike."""

from __future__ import annotations

import math
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import pytest

from dsml_gpu.errors import InvalidValue
from dsml_gpu.reduction import DTYPES, OPERATORS, checked_weight, host
from dsml_gpu.reduction.host import MAX_DIVISOR, HostReducer

BY_NAME = {operator.name: operator for operator in OPERATORS}
FLOATS = [name for name, dtype in DTYPES.items() if dtype.kind not in "iu"]
HALVES = ["FLOAT16", "BFLOAT16"]
INTEGERS = [name for name in DTYPES if name not in FLOATS]
#: The element type in which a pass adds up.
ACCUMULATORS = {"FLOAT16": DTYPES["FLOAT32"], "BFLOAT16": DTYPES["FLOAT32"]}
#: Two vectors of the compiled loops and three elements more: not a multiple of anything.
LENGTHS = {name: 2 * 256 // ACCUMULATORS.get(name, dtype).itemsize + 3 for name, dtype in DTYPES.items()}
#: A few elements, so that every length here is several blocks, and the last one incomplete.
SMALL_BLOCK_BYTES = 416

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")


def unblocked() -> HostReducer:
    return HostReducer(compiles=False, cache_bytes=1 << 60)


def blocked() -> HostReducer:
    return HostReducer(compiles=False, cache_bytes=0, block_bytes=SMALL_BLOCK_BYTES)


def compiled() -> HostReducer:
    """Blocks are for reductions of several passes."""
    return HostReducer(cache_bytes=0, block_bytes=SMALL_BLOCK_BYTES)


@pytest.fixture(params=[unblocked, blocked, pytest.param(compiled, marks=needs_numba)])
def reducer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> HostReducer:
    if request.param is blocked:
        # Otherwise all that is short enough for exact arithmetic is left to the half types' own functions.
        monkeypatch.setattr(host, "SMALL_HALF_BYTES", dict.fromkeys(host.SMALL_HALF_BYTES, 0))
    made: HostReducer = request.param()
    return made


# --- Exact arithmetic


def rounded(value: Fraction, dtype: np.dtype) -> float:
    """The nearest value of a float type, ties to even. `value` is not 0."""
    info = ml_dtypes.finfo(dtype)
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** (max(exponent, int(info.minexp)) - int(info.nmant))
    result = round(value / step) * step  # Python rounds ties of a Fraction to even
    size = math.inf if abs(result) > Fraction(float(info.max)) else float(abs(result))
    return size if value > 0 else -size  # also what is rounded to nothing has a sign


def exact_sum(a: float, b: float, dtype: np.dtype) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    value = Fraction(a) + Fraction(b)
    return rounded(value, dtype) if value else (a if a == b == 0 and math.copysign(1, a) == math.copysign(1, b) else 0.0)


def exact_product(a: float, b: float, dtype: np.dtype) -> float:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a * b
    value = Fraction(a) * Fraction(b)
    return rounded(value, dtype) if value else math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))


def exact_quotient(a: float, divisor: int, dtype: np.dtype) -> float:
    by = rounded(Fraction(divisor), dtype)
    if not math.isfinite(a) or a == 0 or math.isinf(by):
        return a / by
    return rounded(Fraction(a) / Fraction(by), dtype)


def nan_or(choose: Callable[[float, float], float]) -> Callable[[float, float, np.dtype], float]:
    return lambda a, b, dtype: math.nan if math.isnan(a) or math.isnan(b) else choose(a, b)


FLOAT_RULES = {
    "SUM": exact_sum,
    "AVG": exact_sum,
    "PROD": exact_product,
    "MIN": nan_or(min),
    "MAX": nan_or(max),
}
INTEGER_RULES: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "AVG": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MIN": min,
    "MAX": max,
}


def wrapped(value: int, dtype: np.dtype) -> int:
    info = np.iinfo(dtype)
    return (value - int(info.min)) % (1 << info.bits) + int(info.min)


def exact_integers(operator: str, dtype: np.dtype, columns: list[list[int]]) -> list[int]:
    results = []
    for values in zip(*columns, strict=True):
        result = values[0]
        for value in values[1:]:
            result = wrapped(INTEGER_RULES[operator](result, value), dtype)
        results.append(result)
    return results


def to_type(value: float, dtype: np.dtype) -> float:
    return rounded(Fraction(value), dtype) if math.isfinite(value) and value else value


def exact_floats(operator: str, dtype_name: str, columns: list[list[float]]) -> list[float]:
    """What is in the accumulator at the end of the last pass.

    8 sources are in the first pass and 7 more in each other, and after each but the last the result is rounded to the type.
    """
    dtype = DTYPES[dtype_name]
    accumulator = ACCUMULATORS.get(dtype_name, dtype)
    results = []
    for values in zip(*columns, strict=True):
        result = values[0]
        for position, value in enumerate(values[1:]):
            if position and position % 7 == 0:
                result = to_type(result, dtype)
            result = FLOAT_RULES[operator](result, value, accumulator)
        results.append(result)
    return results


# --- Operands


def interesting_floats(dtype: np.dtype, count: int, rng: np.random.Generator) -> np.ndarray:
    """Every bit pattern, values that meet half way between two others, and the ends of the range."""
    info = ml_dtypes.finfo(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    patterns = rng.integers(0, 1 << 8 * dtype.itemsize, count, dtype=np.uint64).astype(unsigned).view(dtype)
    with np.errstate(all="ignore"):
        eps = float(info.eps)
        near = (rng.choice([1.0, 1 + eps, 1 + 3 * eps, 1.5, 2 + 2 * eps, eps / 2, eps], count)).astype(dtype)
        ends = [0.0, -0.0, float(info.max), -float(info.max), float(info.tiny), float(info.smallest_subnormal)]
        special = rng.choice([*ends, -3 * float(info.smallest_subnormal), math.inf, -math.inf, math.nan, 1.0], count)
        kinds = rng.integers(0, 4, count)
        return np.select([kinds == 0, kinds == 1], [patterns, special.astype(dtype)], near).astype(dtype)


def interesting_integers(dtype: np.dtype, count: int, rng: np.random.Generator) -> np.ndarray:
    info = np.iinfo(dtype)
    anything = rng.integers(info.min, info.max, count, dtype=dtype, endpoint=True)
    special = rng.choice(np.array([info.min, info.max, 0, 1, info.min + 1, info.max - 1], dtype), count)
    return np.where(rng.random(count) < 0.7, anything, special)


def as_float64(array: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):  # of signalling NaNs among arbitrary bits
        return array.astype(np.float64)


@cache
def undivided(operator: str, dtype_name: str, nsources: int) -> tuple[tuple[bytes, ...], list[int] | list[float]]:
    """The sources' bytes, and the accumulator that they make."""
    dtype, count = DTYPES[dtype_name], LENGTHS[dtype_name]
    rng = np.random.default_rng([nsources, list(DTYPES).index(dtype_name)])
    if dtype_name in INTEGERS:
        sources = [interesting_integers(dtype, count, rng) for _ in range(nsources)]
        results: list[int] | list[float] = exact_integers(operator, dtype, [source.tolist() for source in sources])
    else:
        sources = [interesting_floats(dtype, count, rng) for _ in range(nsources)]
        results = exact_floats(operator, dtype_name, [as_float64(source).tolist() for source in sources])
    return tuple(source.tobytes() for source in sources), results


@cache
def case(operator: str, dtype_name: str, nsources: int, divisor: int) -> tuple[tuple[bytes, ...], np.ndarray]:
    """The sources' bytes, and the result."""
    dtype = DTYPES[dtype_name]
    contents, results = undivided(operator, dtype_name, nsources)
    if dtype_name in INTEGERS:
        return contents, np.array([math.trunc(Fraction(value) / divisor) for value in results], dtype)
    if divisor > 1:
        results = [exact_quotient(value, divisor, ACCUMULATORS.get(dtype_name, dtype)) for value in results]
    return contents, np.array([to_type(value, dtype) for value in results], np.float64).astype(dtype)


def memory(content: bytes, offset: int = 0) -> np.ndarray:
    """A writable uint8 array at an address that is `offset` above a multiple of 64."""
    room = np.empty(len(content) + 128, np.uint8)
    start = -room.ctypes.data % 64 + offset
    array = room[start : start + len(content)]
    array[:] = np.frombuffer(content, np.uint8)
    return array


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, operator: str) -> None:
    actual = actual.view(expected.dtype)
    if expected.dtype.kind in "iu":
        np.testing.assert_array_equal(actual, expected)
        return
    values, wanted = as_float64(actual), as_float64(expected)
    np.testing.assert_array_equal(values, wanted)  # NaN equals NaN, +0 equals -0
    if operator not in ("MIN", "MAX"):
        numbers = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(values)[numbers], np.signbit(wanted)[numbers])


def reduce_and_check(
    reducer: HostReducer,
    operator: str,
    dtype_name: str,
    nsources: int,
    aliases: Sequence[int | None],
    divisor: int = 1,
    offset: int = 0,
) -> None:
    dtype = DTYPES[dtype_name]
    contents, expected = case(operator, dtype_name, nsources, divisor)
    sources = [memory(content, offset) for content in contents]
    garbage = b"\xa5" * expected.nbytes
    destinations = [memory(garbage, offset) if alias is None else sources[alias] for alias in aliases]
    # The same memory need not be the same array.
    destinations = [array[:] if position % 2 else array for position, array in enumerate(destinations)]
    reducer.prepare(BY_NAME[operator], dtype)

    reducer.reduce(BY_NAME[operator], dtype, sources, destinations, divisor)

    for destination in destinations:
        assert_same_bits(destination, expected, operator)
    for position, (source, content) in enumerate(zip(sources, contents, strict=True)):
        assert position in aliases or source.tobytes() == content, f"source {position} is no destination, and was written"


def placements(nsources: int, ndestinations: int) -> dict[str, list[int | None]]:
    """Which source each destination is."""
    both = min(nsources, ndestinations)
    own: list[None] = [None] * (ndestinations - both)
    return {
        "out of place": [None] * ndestinations,
        "in place": [*range(both), *own],
        "in place, from the last": [*own, *reversed(range(nsources - both, nsources))],
    }


# --- Tests


@pytest.mark.parametrize("operator", BY_NAME)
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_any_number_of_sources_and_destinations(reducer: HostReducer, dtype_name: str, operator: str) -> None:
    for nsources in (1, 2, 3, 4, 8, 9, 16):
        divisor = nsources if operator == "AVG" else 1
        for ndestinations in (1, 2, 4, 9):
            for aliases in placements(nsources, ndestinations).values():
                reduce_and_check(reducer, operator, dtype_name, nsources, aliases, divisor)


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_at_any_address(reducer: HostReducer, dtype_name: str) -> None:
    for operator in BY_NAME:
        for nsources, aliases in ((2, [0]), (2, [None]), (4, [0, 1, 2, 3]), (9, [8])):
            reduce_and_check(reducer, operator, dtype_name, nsources, aliases, offset=1)


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("divisor", [2, 7, 127, 128, 200, 256, MAX_DIVISOR])
def test_divisors(reducer: HostReducer, dtype_name: str, divisor: int) -> None:
    """Also of one source, of several passes, and larger than the type can hold."""
    for nsources, aliases in ((1, [0]), (1, [None, None]), (2, [0]), (3, [2]), (9, [8]), (9, [0, 1, None])):
        reduce_and_check(reducer, "AVG", dtype_name, nsources, aliases, divisor)


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_a_partial_average_is_a_sum(reducer: HostReducer, dtype_name: str) -> None:
    reduce_and_check(reducer, "AVG", dtype_name, 2, [0])


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 63, 64, 65, 127])
def test_lengths(reducer: HostReducer, dtype_name: str, count: int) -> None:
    dtype = DTYPES[dtype_name]
    reducer.prepare(BY_NAME["SUM"], dtype)
    for nsources, ndestinations in ((1, 2), (2, 1), (4, 4), (9, 9)):
        sources = [(np.arange(count) % 7 + source % 2).astype(dtype).view(np.uint8) for source in range(nsources)]
        expected = sum(source.view(dtype).astype(int) for source in sources)
        beyond = [np.full(count * dtype.itemsize + 8, 0xA5, np.uint8) for _ in range(ndestinations)]
        destinations = [array[: count * dtype.itemsize] for array in beyond]
        reducer.reduce(BY_NAME["SUM"], dtype, sources, destinations)
        for destination, array in zip(destinations, beyond, strict=True):
            assert destination.view(dtype).astype(int).tolist() == np.asarray(expected).tolist()
            assert array[destination.size :].tolist() == [0xA5] * 8


@pytest.mark.parametrize("dtype_name", FLOATS)
@pytest.mark.parametrize("operator", ["MIN", "MAX", "SUM", "PROD"])
def test_nan_on_either_side(reducer: HostReducer, dtype_name: str, operator: str) -> None:
    dtype = DTYPES[dtype_name]
    reducer.prepare(BY_NAME[operator], dtype)
    left = np.array([math.nan, 1.0, math.inf, math.nan, -math.inf] * 40, dtype)
    right = np.array([1.0, math.nan, math.nan, math.nan, 2.0] * 40, dtype)
    out = np.zeros_like(left)
    reducer.reduce(BY_NAME[operator], dtype, [left.view(np.uint8), right.view(np.uint8)], [out.view(np.uint8)])
    assert np.isnan(as_float64(out)).tolist() == [True, True, True, True, False] * 40


@pytest.mark.parametrize("dtype_name", HALVES)
def test_every_half(reducer: HostReducer, dtype_name: str) -> None:
    """Each of the 65536 values, kept by a maximum with itself and by a sum with -0."""
    dtype = DTYPES[dtype_name]
    values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    for operator, other in (("MAX", values), ("SUM", np.full_like(values, -0.0))):
        reducer.prepare(BY_NAME[operator], dtype)
        out = np.zeros_like(values)
        reducer.reduce(BY_NAME[operator], dtype, [values.view(np.uint8), other.view(np.uint8)], [out.view(np.uint8)])
        nan = np.isnan(as_float64(values))
        assert np.array_equal(np.isnan(as_float64(out)), nan)
        assert np.array_equal(out.view(np.uint16)[~nan], values.view(np.uint16)[~nan])


@pytest.mark.parametrize("dtype_name", HALVES)
def test_halves_at_every_boundary(reducer: HostReducer, dtype_name: str) -> None:
    """Around values of every exponent: the half way to the next, and a hair less and more, made by a sum of three."""
    dtype = DTYPES[dtype_name]
    info = ml_dtypes.finfo(dtype)
    first = int(np.array(2.0**-8, dtype).view(np.uint16))
    last = int(np.array(float(info.max), dtype).view(np.uint16))
    values = np.arange(first, last + 1, 5, dtype=np.uint16).view(dtype)  # 5: odd and even ones of every exponent
    exponents = np.floor(np.log2(values.astype(np.float64)))
    half_step = np.exp2(exponents - info.nmant - 1)
    for sign in (1, -1):
        base, half = sign * values.astype(np.float64), sign * half_step
        for hair in (0.0, -1.0, 1.0):
            # A hair must show in float32 beside the value, and be a value of the type itself.
            third = half * hair * 2.0 ** (info.nmant - 22)
            sources = [array.astype(dtype) for array in (base, half, third)]
            assert all(np.array_equal(s.astype(np.float64), a) for s, a in zip(sources[:2], (base, half), strict=True))
            shows = sources[2].astype(np.float64) == third
            total = (base + half + third)[shows]
            expected = [rounded(Fraction(value), dtype) for value in total.tolist()]
            reducer.prepare(BY_NAME["SUM"], dtype)
            out = np.zeros_like(sources[0])
            reducer.reduce(BY_NAME["SUM"], dtype, [s.view(np.uint8) for s in sources], [out.view(np.uint8)])
            assert shows.sum() > shows.size // 2
            assert out[shows].astype(np.float64).tolist() == expected


@pytest.mark.parametrize("dtype_name", HALVES)
def test_halves_round_once_in_a_pass(reducer: HostReducer, dtype_name: str) -> None:
    """1 and quarters of its last bit: lost one by one, but not in float32, until a ninth source makes a second pass."""
    dtype = DTYPES[dtype_name]
    eps = float(ml_dtypes.finfo(dtype).eps)
    for nsources, expected in ((2, 1.0), (3, 1.0), (4, 1 + eps), (8, 1 + 2 * eps), (9, 1 + 2 * eps), (12, 1 + 3 * eps)):
        sources = [np.full(67, 1.0 if source == 0 else eps / 4, dtype).view(np.uint8) for source in range(nsources)]
        reducer.prepare(BY_NAME["SUM"], dtype)
        reducer.reduce(BY_NAME["SUM"], dtype, sources, sources[:1])
        assert sources[0].view(dtype).astype(float).tolist() == [expected] * 67, nsources


@pytest.mark.parametrize("dtype_name", HALVES)
@pytest.mark.parametrize("divisor", [3, 5, 7, 10, 49])
def test_averages_of_halves_that_end_half_way(reducer: HostReducer, dtype_name: str, divisor: int) -> None:
    """Exact quotients half way between two values: a product with the reciprocal is a hair beside, and rounds elsewhere."""
    dtype = DTYPES[dtype_name]
    eps = float(ml_dtypes.finfo(dtype).eps)
    quotients = 1 + eps * (np.arange(100) + 0.5)
    totals = divisor * quotients
    left = totals.astype(dtype)
    right = (totals - left.astype(np.float64)).astype(dtype)
    assert np.array_equal(left.astype(np.float64) + right.astype(np.float64), totals)
    reducer.prepare(BY_NAME["AVG"], dtype)
    out = np.zeros_like(left)
    reducer.reduce(BY_NAME["AVG"], dtype, [left.view(np.uint8), right.view(np.uint8)], [out.view(np.uint8)], divisor)
    assert out.astype(float).tolist() == [rounded(Fraction(value), dtype) for value in quotients.tolist()]


def test_a_long_operand_is_reduced_to_its_end() -> None:
    """With the blocks as they are in use, and over the size from which on there are blocks."""
    reducer = HostReducer(compiles=False)
    for name in ("FLOAT64", "FLOAT16", "BFLOAT16", "INT8"):
        dtype = DTYPES[name]
        count = host.CACHE_BYTES // 4 // dtype.itemsize + 13
        sources = [np.full(count, value, dtype).view(np.uint8) for value in (1, 2, 3, 4)]
        reducer.reduce(BY_NAME["SUM"], dtype, sources, sources)
        for source in sources:
            assert (source.view(dtype) == np.array(10, dtype)).all()


def test_the_same_source_twice() -> None:
    for reducer in (unblocked(), blocked()):
        array = np.arange(40.0)
        operand = array.view(np.uint8)
        # Ten sources that are the destination as well: it is complete only after the second pass.
        reducer.reduce(BY_NAME["SUM"], DTYPES["FLOAT64"], [operand] * 10, [operand])
        assert array.tolist() == [10.0 * value for value in range(40)]


def test_blocks_need_no_memory_of_the_operands_size() -> None:
    dtype, nbytes = DTYPES["FLOAT64"], 8 << 20
    sources = [np.zeros(nbytes, np.uint8) for _ in range(9)]
    reducer = HostReducer(compiles=False)
    tracemalloc.start()
    try:
        reducer.reduce(BY_NAME["SUM"], dtype, sources, sources[8:])  # which can accumulate nowhere else
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * host.BLOCK_BYTES


def test_what_is_no_reduction_is_refused(reducer: HostReducer) -> None:
    dtype = DTYPES["FLOAT16"]
    reducer.prepare(BY_NAME["SUM"], dtype)
    operands = [np.zeros(8, np.uint8) for _ in range(4)]
    shorter, longer = np.zeros(2, np.uint8), np.zeros(10, np.uint8)
    frozen = np.frombuffer(bytes(8), np.uint8)
    for wrong in (shorter, longer):
        with pytest.raises(ValueError, match=f"a source of {wrong.nbytes}, a destination of 8 bytes"):
            reducer.reduce(BY_NAME["SUM"], dtype, [*operands[:2], wrong], operands[3:])
        with pytest.raises(ValueError, match=f"destinations of {wrong.nbytes} and 8 bytes"):
            reducer.reduce(BY_NAME["SUM"], dtype, operands[:2], [operands[2], wrong])
        with pytest.raises(ValueError, match=r"differ in size|broadcast"):  # numpy's own message where it is called at once
            reducer.reduce(BY_NAME["SUM"], dtype, operands[:2], [wrong])
    with pytest.raises(ValueError, match="read-only"):
        reducer.reduce(BY_NAME["SUM"], dtype, operands[:2], [frozen])
    for divisor in (0, -1, MAX_DIVISOR + 1):
        with pytest.raises(ValueError, match=f"divisor must be 1 to {MAX_DIVISOR}, not {divisor}"):
            reducer.reduce(BY_NAME["AVG"], dtype, operands[:2], operands[2:3], divisor)


def test_sources_may_be_read_only(reducer: HostReducer) -> None:
    for name, dtype in DTYPES.items():
        reducer.prepare(BY_NAME["SUM"], dtype)
        source = np.frombuffer(np.ones(5, dtype).tobytes(), np.uint8)
        for count in (2, 3):
            out = np.zeros_like(source)
            reducer.reduce(BY_NAME["SUM"], dtype, [source] * count, [out])
            assert out.view(dtype).astype(int).tolist() == [count] * 5, name


def test_threads_do_not_share_scratch() -> None:
    reducer = blocked()
    wrong: list[int] = []

    def work(value: int) -> None:
        for _ in range(10):
            sources = [np.full(2001, value, np.float16).view(np.uint8) for _ in range(9)]
            reducer.reduce(BY_NAME["SUM"], DTYPES["FLOAT16"], sources, sources[8:])
            if (sources[8].view(np.float16) != 9 * value).any():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_numba_all_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_numba_is_installed", lambda: False)
    reducer = HostReducer()
    assert reducer.is_ready(BY_NAME["SUM"], DTYPES["BFLOAT16"], sources=4, destinations=4)
    reducer.prepare(BY_NAME["SUM"], DTYPES["BFLOAT16"])
    reduce_and_check(reducer, "SUM", "BFLOAT16", 2, [0])


# --- Weights


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("offset", [0, 3])
def test_weights(reducer: HostReducer, dtype_name: str, in_place: bool, offset: int) -> None:
    """Against numpy with scalars of the same type, over more than one block, at any address."""
    dtype = DTYPES[dtype_name]
    reducer.prepare(BY_NAME["SUM"], dtype, weighted=True)
    count = 5 * SMALL_BLOCK_BYTES + 1
    generator = np.random.default_rng(1)
    room = np.zeros(2 * (count * dtype.itemsize + 8), np.uint8)
    source = room[offset : offset + count * dtype.itemsize]
    source[:] = generator.integers(0, 256, source.size, np.uint8)
    before = source.copy().view(dtype)
    target = source if in_place else room[-count * dtype.itemsize :]
    for weight in (3, -2 if dtype.kind == "i" else 2) if dtype.kind in "iu" else (1 / 3, -2.5):
        source[:] = before.view(np.uint8)
        reducer.weigh(dtype, source, target, checked_weight(weight, dtype))
        with np.errstate(all="ignore"):
            if dtype_name in HALVES:
                wanted = (before.astype(np.float32) * np.float32(weight)).astype(dtype)
            else:
                wanted = before * dtype.type(weight)
            same = target.view(f"u{dtype.itemsize}") == wanted.view(f"u{dtype.itemsize}")
            if dtype.kind not in "iu":
                same |= np.isnan(target.view(dtype)) & np.isnan(wanted)
        assert same.all()


def weights_for(dtype_name: str) -> list[float]:
    """The ends of the range, and numbers that do not come out even."""
    dtype = DTYPES[dtype_name]
    if dtype_name in INTEGERS:
        info = np.iinfo(dtype)
        return [0, 1, 3, 101, int(info.max), *((int(info.min), -1, -7) if info.min else ())]
    eps = float(ml_dtypes.finfo(dtype).eps)
    return [0.0, -0.0, 1.0, 1 / 3, -1.5, 1 + eps, 2.0**-20, 65520.0, 1e300, -math.inf, math.nan]


@cache
def weighed(dtype_name: str) -> tuple[bytes, list[np.ndarray]]:
    """Values' bytes, and for each weight the exact products, rounded to the accumulator and then to the type, or wrapped."""
    dtype, count, weights = DTYPES[dtype_name], LENGTHS[dtype_name], weights_for(dtype_name)
    rng = np.random.default_rng(list(DTYPES).index(dtype_name))
    if dtype_name in INTEGERS:
        values = interesting_integers(dtype, count, rng)
        rows = [[wrapped(value * int(weight), dtype) for value in values.tolist()] for weight in weights]
        return values.tobytes(), [np.array(row, dtype) for row in rows]
    values = interesting_floats(dtype, count, rng)
    accumulator = ACCUMULATORS.get(dtype_name, dtype)
    products = [
        [exact_product(value, to_type(weight, accumulator), accumulator) for value in as_float64(values).tolist()]
        for weight in weights
    ]
    return values.tobytes(), [
        np.array([to_type(value, dtype) for value in row], np.float64).astype(dtype) for row in products
    ]


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_weights_are_multiplied_exactly_and_rounded_as_said(reducer: HostReducer, dtype_name: str) -> None:
    dtype = DTYPES[dtype_name]
    reducer.prepare(BY_NAME["SUM"], dtype, weighted=True)
    content, results = weighed(dtype_name)
    for weight, expected in zip(weights_for(dtype_name), results, strict=True):
        for in_place, offset in ((True, 0), (False, 0), (True, 1), (False, 1)):
            source = memory(content, offset)
            beyond = memory(content + b"\xa5" * 8, offset)
            destination = beyond[: len(content)]
            reducer.weigh(dtype, destination[:] if in_place else source, destination, checked_weight(weight, dtype))
            assert_same_bits(destination, expected, "PROD")
            assert source.tobytes() == content
            assert beyond[len(content) :].tolist() == [0xA5] * 8


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65])
def test_lengths_of_what_is_weighed(reducer: HostReducer, dtype_name: str, count: int) -> None:
    dtype = DTYPES[dtype_name]
    reducer.prepare(BY_NAME["SUM"], dtype, weighted=True)
    array = np.arange(count).astype(dtype)
    reducer.weigh(dtype, array.view(np.uint8), array.view(np.uint8), checked_weight(2, dtype))
    assert array.astype(int).tolist() == np.arange(0, 2 * count, 2).astype(dtype).astype(int).tolist()


def test_what_cannot_be_weighed_is_refused(reducer: HostReducer) -> None:
    dtype = DTYPES["BFLOAT16"]
    reducer.prepare(BY_NAME["SUM"], dtype, weighted=True)
    operand, shorter, frozen = np.zeros(8, np.uint8), np.zeros(2, np.uint8), np.frombuffer(bytes(8), np.uint8)
    weight = checked_weight(2, dtype)
    with pytest.raises(ValueError, match="a source of 2, a destination of 8 bytes"):
        reducer.weigh(dtype, shorter, operand, weight)
    with pytest.raises(ValueError, match="read-only"):
        reducer.weigh(dtype, operand, frozen, weight)
    reducer.weigh(dtype, frozen, operand, weight)


@pytest.mark.parametrize(
    ("weight", "dtype_name", "words"),
    [
        (0.5, "INT32", "a weight of int32 must be a whole number, not 0.5"),
        (1.0000001, "INT32", "a weight of int32 must be a whole number, not 1.0000001"),
        (math.inf, "INT64", "a weight of int64 must be a whole number, not inf"),
        (math.nan, "UINT8", "a weight of uint8 must be a whole number, not nan"),
        (-1, "UINT8", "a weight of uint8 must be 0 to 255, not -1"),
        (128, "INT8", "a weight of int8 must be -128 to 127, not 128"),
        (2.0**63, "INT64", "a weight of int64 must be -9223372036854775808 to 9223372036854775807, not 9223372036854775808"),
    ],
)
def test_weights_that_a_type_has_not_are_refused(weight: float, dtype_name: str, words: str) -> None:
    with pytest.raises(InvalidValue, match=words):
        checked_weight(weight, DTYPES[dtype_name])


@pytest.mark.parametrize("dtype_name", FLOATS)
def test_any_number_is_a_weight_of_floats(dtype_name: str) -> None:
    for weight in (0.1, -1e300, math.inf, math.nan):
        found = checked_weight(weight, DTYPES[dtype_name])
        assert found.dtype == ACCUMULATORS.get(dtype_name, DTYPES[dtype_name])
    assert checked_weight(0.1, DTYPES["BFLOAT16"]) == np.float32(0.1), "not rounded to the half type"


@pytest.mark.parametrize("dtype_name", FLOATS)
def test_a_weight_is_nan_whatever_its_bits(reducer: HostReducer, dtype_name: str) -> None:
    """Rounded to bfloat16 without a look, a NaN of all ones would be -0."""
    dtype = DTYPES[dtype_name]
    reducer.prepare(BY_NAME["SUM"], dtype, weighted=True)
    for bits in (0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 0x7FF0000000000001):
        array = np.ones(67, dtype)
        weight = checked_weight(float(np.array(bits, np.uint64).view(np.float64)), dtype)
        reducer.weigh(dtype, array.view(np.uint8), array.view(np.uint8), weight)
        assert np.isnan(as_float64(array)).all(), hex(bits)


@pytest.mark.parametrize("dtype_name", INTEGERS)
def test_weights_of_integers_go_to_both_ends_of_the_type(dtype_name: str) -> None:
    dtype = DTYPES[dtype_name]
    info = np.iinfo(dtype)
    for weight in (int(info.min), int(info.max), -0.0):
        found = checked_weight(weight, dtype)
        assert found.dtype == dtype
        assert int(found) == weight
    for weight in (int(info.min) - 1, int(info.max) + 1):
        with pytest.raises(InvalidValue, match=f"must be {info.min} to {info.max}, not {weight}"):
            checked_weight(weight, dtype)
