"""The kernels' source as a C++ compiler reads it, against numpy and ml_dtypes.

What a GPU does otherwise is not seen here: its conversions of half types, and threads that truly run side by side.
"""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from dsml_gpu.reduction import DTYPES, OPERATORS, kernels
from dsml_gpu.reduction.operators import Operator
from dsml_gpu.reduction.passes import MAX_OPERANDS
from tests.kernels import cases
from tests.kernels.cases import check
from tests.kernels.on_cpu import Grid, Program, address

HALF_TYPES = ("FLOAT16", "BFLOAT16")


def test_python_knows_the_layout_of_the_arguments(program: Program):
    fields = {name: (offset, dtype.itemsize) for name, (dtype, offset) in kernels.ARGUMENTS.fields.items()}
    assert program.layout() == {
        **fields,
        "ReduceArguments": (0, kernels.ARGUMENTS.itemsize),
        "kMaxOperands": (MAX_OPERANDS,),
        "kThreads": (kernels.BLOCK_THREADS,),
        "kPackBytes": (cases.PACK_BYTES,),
        "kPacksInFlight": (cases.PACKS_IN_FLIGHT,),
    }
    assert MAX_OPERANDS == cases.MAX_OPERANDS


@pytest.mark.parametrize("dtype_name", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_every_number_of_sources_and_destinations(program: Program, operator: Operator, dtype_name: str):
    assert check(program, cases.breadth(operator, dtype_name)) >= 64
    assert check(program, cases.real_blocks(operator, dtype_name)) == 3


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_every_alignment_and_length(program: Program, dtype_name: str):
    assert check(program, cases.boundaries(dtype_name)) > 300


def test_copies(program: Program):
    assert check(program, cases.copies()) > 1000


@pytest.mark.parametrize("dtype_name", DTYPES)
def test_weights(program: Program, dtype_name: str):
    assert check(program, cases.weighings(dtype_name)) > 100


def convert(program: Program, kernel: str, values: np.ndarray, to: np.dtype) -> np.ndarray:
    arguments = np.zeros(1, kernels.ARGUMENTS)
    arguments["sources"][0, 0], arguments["destinations"][0, 0], arguments["count"] = (
        address(0, 0),
        address(1, 0),
        values.size,
    )
    launch = kernels.Launch(kernel, arguments, 1)
    buffers = [values.view(np.uint8), np.zeros(values.size * to.itemsize, np.uint8)]
    ((_, converted),) = program.run([(launch, Grid(1, 1), buffers)])
    return converted.view(to)


def all_halves(dtype_name: str) -> np.ndarray:
    return np.arange(1 << 16, dtype=np.uint16).view(DTYPES[dtype_name])


@pytest.mark.parametrize("dtype_name", HALF_TYPES)
def test_every_half_widens_to_its_own_value(program: Program, dtype_name: str):
    halves = all_halves(dtype_name)
    wide = convert(program, f"widen {dtype_name.lower()}", halves, np.dtype(np.float32))
    expected = halves.astype(np.float32)
    numbers = ~np.isnan(expected)
    assert (wide.view(np.uint32) == expected.view(np.uint32))[numbers].all()
    assert np.isnan(wide[~numbers]).all()
    assert (~numbers).sum() == {"FLOAT16": 2 * 1023, "BFLOAT16": 2 * 127}[dtype_name]


@pytest.mark.parametrize("dtype_name", HALF_TYPES)
def test_floats_narrow_to_the_nearest_half(program: Program, dtype_name: str):
    """Every half, every float32 half way between two of them or between the last and infinity, and both neighbours."""
    dtype = DTYPES[dtype_name]
    halves = all_halves(dtype_name)[: 1 << 15]  # of plus sign
    with np.errstate(invalid="ignore"):  # ml_dtypes says so when it meets a NaN
        exact = halves[np.isfinite(halves)].astype(np.float64)
    step_beyond = exact[-1] - exact[-2]
    middles = (exact + np.append(exact[1:], exact[-1] + step_beyond)) / 2
    points = np.concatenate([exact, middles]).astype(np.float32)
    assert (points[len(exact) :] == middles).all(), "each is a float32, so each is a tie"
    zero, infinity = np.float32(0), np.float32(np.inf)
    values = np.concatenate([points, np.nextafter(points, zero), np.nextafter(points, infinity)])
    # A NaN may have only bits that a half has no room for.
    nans = np.array([0x7F800001, 0x7F801000, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001], np.uint32).view(np.float32)
    any_bits = np.frombuffer(np.random.default_rng(0).bytes(1 << 20), np.float32)
    values = np.concatenate([values, -values, [infinity, -infinity], nans, any_bits]).astype(np.float32)

    narrow = convert(program, f"narrow {dtype_name.lower()}", values, dtype)

    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
    wrong = (narrow.view(np.uint16) != expected.view(np.uint16)) & ~(np.isnan(narrow) & np.isnan(expected))
    assert not wrong.any(), f"{values[wrong][:5]} became {narrow[wrong][:5]}, expected {expected[wrong][:5]}"


@pytest.mark.parametrize("dtype_name", [name for name, dtype in DTYPES.items() if dtype.kind in "iu"])
def test_the_integers_are_the_hard_ones(dtype_name: str):
    """Without these the tests above would prove less than they say."""
    values, info = cases.pool(dtype_name), np.iinfo(DTYPES[dtype_name])
    exact = values[0].astype(object) + values[1].astype(object)
    assert (exact > info.max).sum() > 100
    assert info.min == 0 or (exact < info.min).sum() > 100
    assert info.min == 0 or (cases.reduced("SUM", values, 1) < 0).sum() > 100, "averages to truncate toward zero"


@pytest.mark.parametrize("dtype_name", [name for name, dtype in DTYPES.items() if dtype.kind not in "iu"])
@np.errstate(all="ignore")
def test_the_floats_are_the_hard_ones(dtype_name: str):
    """Likewise. More than a hundred of each kind: a case sees a part of the values."""
    values, info = cases.pool(dtype_name), ml_dtypes.finfo(DTYPES[dtype_name])
    wide = values.astype(np.float64)
    result = cases.reduced("SUM", values[:2], 1)
    assert np.isnan(wide).any(axis=0).sum() > 100
    overflown = np.isinf(result) & np.isfinite(wide[:2]).all(axis=0)
    assert overflown.sum() > 100
    subnormal = (result != 0) & (np.abs(result.astype(np.float64)) < float(info.tiny))
    assert subnormal.sum() > 100
    if dtype_name not in HALF_TYPES:
        return

    dropped_bits = 23 - int(info.nmant)
    total = wide[0] + wide[1]
    rest = total.astype(np.float32).view(np.uint32) & ((1 << dropped_bits) - 1)
    ties = np.isfinite(result) & (np.abs(total) > float(info.tiny)) & (rest == 1 << (dropped_bits - 1))
    rounded_up = result.astype(np.float64)[ties] > total[ties]
    assert rounded_up.sum() > 100
    assert (~rounded_up).sum() > 100

    rounded_at_each_step = values[0]
    for row in values[1:]:
        rounded_at_each_step = cases.reduced("SUM", np.stack([rounded_at_each_step, row]), 1)
    differ = cases.reduced("SUM", values, 1).view(np.uint16) != rounded_at_each_step.view(np.uint16)
    assert differ.sum() > 100


@pytest.mark.parametrize("dtype_name", DTYPES)
@np.errstate(all="ignore")
def test_the_weights_are_the_hard_ones(dtype_name: str):
    """Likewise: products that overflow, or are subnormal, and ties of half types; a weight that was rounded to one shows."""
    values, weights = cases.pool(dtype_name)[0], cases.weights_for(dtype_name)
    dtype = DTYPES[dtype_name]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        exact = [values.astype(object) * weight for weight in weights]
        assert sum(int((each > info.max).sum()) for each in exact) > 100
        assert info.min == 0 or sum(int((each < info.min).sum()) for each in exact) > 100
        return

    least_normal = float(ml_dtypes.finfo(dtype).tiny)
    overflown = subnormal = up = down = differ = 0
    for weight in filter(np.isfinite, weights):
        result = cases.weighed(values, weight)
        overflown += int((np.isinf(result) & np.isfinite(values)).sum())
        subnormal += int(((result != 0) & (np.abs(result.astype(np.float64)) < least_normal)).sum())
        if dtype_name not in HALF_TYPES:
            continue
        product = values.astype(np.float32) * np.float32(weight)
        dropped_bits = 23 - int(ml_dtypes.finfo(dtype).nmant)
        rest = product.view(np.uint32) & ((1 << dropped_bits) - 1)
        ties = np.isfinite(result) & (np.abs(product) > least_normal) & (rest == 1 << (dropped_bits - 1))
        rounded_up = np.abs(result.astype(np.float32))[ties] > np.abs(product[ties])
        up, down = up + int(rounded_up.sum()), down + int((~rounded_up).sum())
        rounded_weight = cases.weighed(values, float(np.array(weight, dtype)))
        differ += int((result.view(np.uint16) != rounded_weight.view(np.uint16)).sum())
    assert min(overflown, subnormal) > 100
    assert dtype_name not in HALF_TYPES or min(up, down, differ) > 100


def test_no_operator_and_no_type_is_left_out():
    named = {case.launch.kernel for case in cases.copies()}
    named |= {case.launch.kernel for dtype_name in DTYPES for case in cases.weighings(dtype_name)}
    for operator, dtype_name in itertools.product(OPERATORS, DTYPES):
        named |= {case.launch.kernel for case in cases.breadth(operator, dtype_name, each=1)}
    assert named == {name for names in kernels.instantiations().values() for name in names}
