"""All-reduce against numpy: every type, operator, algorithm and number of ranks, in process and over gRPC streams."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from dsml_gpu.coordinator.plan import Collective
from dsml_gpu.memory.backend import NUMPY
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import ALL_REDUCE
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.harness import Ranks, ranks

ALGORITHMS = sorted(ALL_REDUCE)
OPS = ["SUM", "PROD", "MIN", "MAX", "AVG"]


def inputs_for(dtype: np.dtype, op: str, nranks: int, count: int) -> list[np.ndarray]:
    """Small whole numbers, so that every order of summation gives the same exact result in every type."""
    generator = np.random.default_rng([nranks, count])
    low, high = (1, 3) if op == "PROD" else (0, 8) if dtype.kind == "u" else (-7, 8)
    return [generator.integers(low, high, count).astype(dtype) for _ in range(nranks)]


def expected(inputs: list[np.ndarray], op: str) -> np.ndarray:
    """The result by exact arithmetic, rounded once."""
    dtype = inputs[0].dtype
    exact = np.stack([values.astype(np.float64) for values in inputs])
    if op == "AVG":
        total = exact.sum(axis=0)
        if dtype.kind in "iu":
            return np.trunc(total / len(inputs)).astype(dtype)
        wide = np.float32 if dtype.itemsize == 2 else dtype.type
        return (total.astype(wide) / wide(len(inputs))).astype(dtype)
    reduced = {"SUM": np.sum, "PROD": np.prod, "MIN": np.min, "MAX": np.max}[op](exact, axis=0)
    if dtype.kind in "iu":  # 2**9 leaves 8 bits
        return np.asarray(reduced.astype(np.int64).astype(dtype))
    return np.asarray(reduced.astype(dtype))


async def check(world: Ranks, dtype: np.dtype, op: str, algorithm: str, count: int) -> None:
    nranks = len(world.devices)
    inputs = inputs_for(dtype, op, nranks, count)
    results = await world.all_reduce(inputs, op, algorithm)
    for rank, result in enumerate(results):
        np.testing.assert_array_equal(
            result.astype(np.float64),
            expected(inputs, op).astype(np.float64),
            err_msg=f"{dtype} {op} {algorithm}, rank {rank} of {nranks}, {count} elements",
        )


@pytest.mark.parametrize("nranks", range(1, 10))
def test_every_type_operator_and_algorithm_in_process(nranks: int) -> None:
    async def scenario() -> None:
        async with ranks(nranks, pb.AUTO) as world:
            for dtype in DTYPES.values():
                for op in OPS:
                    for algorithm in ALGORITHMS:
                        for count in {0, 1, nranks - 1, 997}:
                            await check(world, dtype, op, algorithm, count)

    asyncio.run(scenario())


@pytest.mark.parametrize("nranks", [2, 3, 5])
def test_over_grpc_streams(nranks: int) -> None:
    async def scenario() -> None:
        async with ranks(nranks, pb.GRPC) as world:
            for algorithm in ALGORITHMS:
                for number, dtype in enumerate(DTYPES.values()):
                    await check(world, dtype, OPS[number % len(OPS)], algorithm, 7919)
                for count in (0, 1, nranks - 1):
                    await check(world, DTYPES["FLOAT64"], "SUM", algorithm, count)

    asyncio.run(scenario())


APART = replace(
    NUMPY,
    name="apart",
    to_host=lambda array: array.copy(),
    from_host=lambda array: array.copy(),
    computes=lambda array, dtype: array.ctypes.data % dtype.itemsize == 0 and dtype.kind in "iuf",
)


@pytest.mark.parametrize("transport", [pb.P2P, pb.GRPC])
def test_memory_that_is_not_host_memory(transport: int) -> None:
    """As on a GPU: what the host has is a copy, and some bytes can be computed on by the host alone."""

    async def scenario() -> None:
        async with ranks(3, transport, backend=APART) as world:
            for dtype in DTYPES.values():
                for op in OPS:
                    await check(world, dtype, op, "ring", 997)
            for result in await world.all_reduce([np.ones(1001)] * 3, "SUM", "ring", addr=61):
                assert (result == 3).all()

    asyncio.run(scenario())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_float_results_are_the_same_bits_on_all_ranks_and_over_all_transports(algorithm: str) -> None:
    """The order of every reduction is fixed by the schedule, not by the timing."""
    generator = np.random.default_rng(7)
    inputs = [generator.standard_normal(20_011) for _ in range(5)]
    seen = []

    async def scenario(transport: int) -> None:
        async with ranks(5, transport) as world:
            for _ in range(3):
                seen.extend(result.tobytes() for result in await world.all_reduce(inputs, "SUM", algorithm))

    for transport in (pb.P2P, pb.GRPC):
        asyncio.run(scenario(transport))
    assert len(seen) == 2 * 3 * 5
    assert len(set(seen)) == 1
    assert np.abs(np.frombuffer(seen[0]) - np.sum(inputs, axis=0)).max() < 1e-13


def test_unaligned_buffers() -> None:
    async def scenario() -> None:
        for transport in (pb.P2P, pb.GRPC):
            async with ranks(3, transport) as world:
                inputs = inputs_for(DTYPES["FLOAT64"], "SUM", 3, 1001)
                for result in await world.all_reduce(inputs, "SUM", "ring", addr=61):
                    np.testing.assert_array_equal(result, expected(inputs, "SUM"))

    asyncio.run(scenario())


def test_nothing_beside_the_buffers_is_written() -> None:
    async def scenario() -> None:
        async with ranks(3, pb.AUTO) as world:
            for device in world.devices:
                device.arena.write(0, b"\xaa" * 64)
                device.arena.write(64 + 8 * 1001, b"\xbb" * 64)
            await world.all_reduce(inputs_for(DTYPES["FLOAT64"], "SUM", 3, 1001), "SUM", "ring")
            for device in world.devices:
                assert bytes(device.arena.read(0, 64)) == b"\xaa" * 64
                assert bytes(device.arena.read(64 + 8 * 1001, 64)) == b"\xbb" * 64

    asyncio.run(scenario())


@pytest.mark.parametrize("transport", [pb.P2P, pb.GRPC])
def test_a_group_runs_in_order_on_one_buffer(transport: int) -> None:
    """x <- sum, then x <- max, then x <- average, all of the same x: any overlap would show."""

    async def scenario() -> None:
        async with ranks(4, transport) as world:
            count = 30_000
            for rank, device in enumerate(world.devices):
                device.arena.write(0, np.full(count, rank + 1.0).view(np.uint8).data)
            addrs = (0,) * 4
            steps = [("ring", "SUM"), ("naive", "SUM"), ("ring", "AVG"), ("naive", "MAX"), ("ring", "SUM")]
            await world.run(
                [
                    Collective("all_reduce", algorithm, addrs, count * 8, pb.FLOAT64, pb.ReduceOp.Value(op))
                    for algorithm, op in steps
                ]
            )
            for device in world.devices:
                assert set(np.frombuffer(device.arena.read(0, count * 8))) == {10.0 * 4 * 4}

    asyncio.run(scenario())
