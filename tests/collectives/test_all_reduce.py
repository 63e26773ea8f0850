"""All-reduce in place: the same bits everywhere, odd addresses, and groups on one buffer."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dsml_gpu.reduction import DTYPES
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.checks import ALGORITHMS, expected, inputs_for
from tests.collectives.harness import all_reduce_request, ranks, read, write


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
                await write(device.arena, 0, np.full(64, 0xAA, np.uint8))
                await write(device.arena, 64 + 8 * 1001, np.full(64, 0xBB, np.uint8))
            await world.all_reduce(inputs_for(DTYPES["FLOAT64"], "SUM", 3, 1001), "SUM", "ring")
            for device in world.devices:
                for addr, byte in ((0, 0xAA), (64 + 8 * 1001, 0xBB)):
                    assert set(await read(device.arena, addr, DTYPES["UINT8"], 64)) == {byte}

    asyncio.run(scenario())


@pytest.mark.parametrize("transport", [pb.P2P, pb.GRPC])
def test_a_group_runs_in_order_on_one_buffer(transport: int) -> None:
    """x <- sum, then x <- max, then x <- average, all of the same x: any overlap would show."""

    async def scenario() -> None:
        async with ranks(4, transport) as world:
            count = 30_000
            for rank, device in enumerate(world.devices):
                await write(device.arena, 0, np.full(count, rank + 1.0))
            steps = [("ring", "SUM"), ("naive", "SUM"), ("ring", "AVG"), ("naive", "MAX"), ("ring", "SUM")]
            await world.run(
                [all_reduce_request((0,) * 4, count * 8, DTYPES["FLOAT64"], op, algorithm) for algorithm, op in steps]
            )
            for device in world.devices:
                assert set(await read(device.arena, 0, DTYPES["FLOAT64"], count)) == {10.0 * 4 * 4}

    asyncio.run(scenario())
