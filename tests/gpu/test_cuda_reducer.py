"""The kernels as the executor uses them, against the host's reducer: the same bits."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
import pytest

from dsml_gpu.memory.backend import select_backends
from dsml_gpu.reduction import DTYPES, OPERATORS, HostReducer, Operator, checked_weight

ON_HOST = HostReducer()
COUNT = 1003


def memory_and_reducer() -> tuple[Any, Any]:
    from dsml_gpu.reduction.cuda import CudaReducer

    (backend,), _ = select_backends("cupy", [0])
    memory: Any = backend.open()
    return memory, CudaReducer(memory.gpu, memory.compute)


def values(dtype: np.dtype, operands: int) -> list[np.ndarray]:
    """Bits as they come, with NaN and infinities among them."""
    generator = np.random.default_rng(operands)
    return [generator.integers(0, 256, COUNT * dtype.itemsize, dtype=np.uint8).view(dtype) for _ in range(operands)]


async def same_on_both(
    operator: Operator, dtype: np.dtype, nsources: int, ndestinations: int, in_place: bool, offset: int, divisor: int
) -> None:
    memory, reducer = memory_and_reducer()
    buffers = [array.view(np.uint8) for array in values(dtype, nsources)]
    fresh = [np.zeros(buffers[0].nbytes, np.uint8) for _ in range(ndestinations)]
    arena = memory.allocate((nsources + ndestinations) * (buffers[0].nbytes + 64))

    def place(number: int) -> Any:
        start = number * (buffers[0].nbytes + 64) // 16 * 16 + offset
        return arena[start : start + buffers[0].nbytes]

    sources = [place(number) for number in range(nsources)]
    for target, data in zip(sources, buffers, strict=True):
        await memory.write(target, data)
    outputs = [place(nsources + number) for number in range(ndestinations)]
    host_outputs = fresh
    if in_place:
        shared = min(nsources, ndestinations)
        outputs = [*sources[-shared:], *outputs[shared:]]
        host_outputs = [*buffers[-shared:], *fresh[shared:]]
    reducer.reduce(operator, dtype, sources, outputs, divisor)
    ON_HOST.reduce(operator, dtype, buffers, host_outputs, divisor)
    for output, expected in zip(outputs, host_outputs, strict=True):
        download = memory.begin_download(output)
        got = (await download.wait()).view(dtype)
        same_bits(got, expected.view(dtype), operator)
        download.release()


def same_bits(got: np.ndarray, expected: np.ndarray, operator: Operator) -> None:
    """Bit for bit, but for what is in a NaN, and for which of two zeros a minimum is."""
    if got.dtype.kind in "iu":
        np.testing.assert_array_equal(got, expected)
        return
    with np.errstate(invalid="ignore"):  # casts of signalling NaN
        got_wide, expected_wide = got.astype(np.float64), expected.astype(np.float64)
    nan = np.isnan(expected_wide)
    np.testing.assert_array_equal(np.isnan(got_wide), nan)
    if operator.name in ("MIN", "MAX"):
        np.testing.assert_array_equal(got_wide[~nan], expected_wide[~nan])
    else:
        unsigned = np.dtype(f"u{got.dtype.itemsize}")
        np.testing.assert_array_equal(got.view(unsigned)[~nan], expected.view(unsigned)[~nan])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_same_bits_as_on_the_host(gpu: Any, operator: Operator, dtype: np.dtype) -> None:
    async def scenario() -> None:
        for nsources, ndestinations, in_place, offset in [
            (2, 1, True, 0),
            (2, 1, True, 8),
            (2, 1, False, 3),
            (1, 1, False, 0),
            (4, 4, True, 0),
            (8, 8, False, 0),
            (9, 1, True, 0),
            (16, 16, True, 8),
            (17, 9, False, 1),
        ]:
            divisor = nsources if operator.averages else 1
            await same_on_both(operator, dtype, nsources, ndestinations, in_place, offset, divisor)

    asyncio.run(scenario())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_weights_give_the_same_bits_as_on_the_host(gpu: Any, dtype: np.dtype) -> None:
    (before,) = values(dtype, 1)
    weight = checked_weight(3 if dtype.kind in "iu" else 1 / 3, dtype)

    async def scenario(offset: int, in_place: bool) -> None:
        memory, reducer = memory_and_reducer()
        arena = memory.allocate(3 * before.nbytes)
        source = arena[offset : offset + before.nbytes]
        target = source if in_place else arena[-before.nbytes :]
        await memory.write(source, before.view(np.uint8))
        reducer.weigh(dtype, source, target, weight)
        on_host = np.zeros(before.nbytes, np.uint8)
        ON_HOST.weigh(dtype, before.view(np.uint8), on_host, weight)
        download = memory.begin_download(target)
        same_bits((await download.wait()).view(dtype), on_host.view(dtype), OPERATORS[0])
        download.release()

    for offset, in_place in [(0, True), (0, False), (8, True), (3, False)]:
        asyncio.run(scenario(offset, in_place))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_a_sum_of_what_was_just_weighed(gpu: Any, dtype: np.dtype) -> None:
    """Nothing is waited for between the two, which one stream keeps in order."""
    first, second = (array.view(np.uint8) for array in values(dtype, 2))
    weights = [checked_weight(weight, dtype) for weight in ((3, 5) if dtype.kind in "iu" else (1 / 3, -2.5))]

    async def scenario() -> np.ndarray:
        memory, reducer = memory_and_reducer()
        operands = [memory.allocate(array.nbytes) for array in (first, second)]
        for operand, array, weight in zip(operands, (first, second), weights, strict=True):
            await memory.write(operand, array)
            reducer.weigh(dtype, operand, operand, weight)
        reducer.reduce(OPERATORS[0], dtype, operands, operands[:1])
        download = memory.begin_download(operands[0])
        got = (await download.wait()).copy()
        download.release()
        return got

    got = asyncio.run(scenario())
    for array, weight in zip((first, second), weights, strict=True):
        ON_HOST.weigh(dtype, array, array, weight)
    ON_HOST.reduce(OPERATORS[0], dtype, (first, second), (first,))
    same_bits(got.view(dtype), first.view(dtype), OPERATORS[0])


def test_nothing_to_reduce(gpu: Any) -> None:
    async def scenario() -> None:
        memory, reducer = memory_and_reducer()
        array = memory.allocate(8)
        reducer.reduce(OPERATORS[0], DTYPES["FLOAT64"], (array[:0], array[:0]), (array[:0],))
        reducer.weigh(DTYPES["FLOAT64"], array[:0], array[:0], checked_weight(2, DTYPES["FLOAT64"]))
        await memory.finish()

    asyncio.run(scenario())


def test_prepared_kernels_are_ready_announced_and_shared(gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    from dsml_gpu.reduction import cuda

    cuda._CACHES.clear()
    _, reducer = memory_and_reducer()
    average = OPERATORS[-1]
    dtype = DTYPES["BFLOAT16"]
    assert not reducer.is_ready(average, dtype)
    with caplog.at_level(logging.INFO):
        reducer.prepare(average, dtype)
        reducer.prepare(average, dtype)
    assert reducer.is_ready(average, dtype)
    # An average is a sum until the last hop; no other kernel is compiled.
    announced = [record.getMessage() for record in caplog.records if record.name == "dsml_gpu.reduction.cuda"]
    assert len(announced) == 2, announced
    assert {message.split(" is ready after")[0] for message in announced} == {
        "kernel reduce<bfloat16, Avg, 2>",
        "kernel reduce<bfloat16, Sum, 2>",
    }
    _, another = memory_and_reducer()
    assert another.is_ready(average, dtype)
    assert another.is_ready(OPERATORS[0], dtype)
    assert not another.is_ready(OPERATORS[1], dtype)
    assert not another.is_ready(average, dtype, weighted=True)
    reducer.prepare(average, dtype, weighted=True)
    assert another.is_ready(average, dtype, weighted=True)
