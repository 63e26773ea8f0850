"""The executor where schedules and peers are not the usual ones."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dsml_gpu.errors import OperationAborted, OperationTimeout
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import Schedule, Transfer
from dsml_gpu.transport.emulation import LinkSettings
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.harness import all_reduce_request, ranks, write

BOTH = pytest.mark.parametrize("transport", [pb.P2P, pb.GRPC])


#: Both ranks send all they have to each other in one step, and each reads what it is about to overwrite.
EXCHANGE = Schedule("all_reduce", "exchange", 2, 1, ((Transfer(0, 1, 0, reduce=True), Transfer(1, 0, 0, reduce=True)),))


@BOTH
def test_an_exchange_in_place_does_not_lock_up(transport: int) -> None:
    """Over p2p each rank's memory is lent to the other, and must not be overwritten before the other has read it."""

    async def scenario() -> None:
        async with ranks(2, transport, stall_timeout_s=3) as world:
            inputs = [np.arange(50_000.0), np.arange(50_000.0) ** 2]
            for result in await world.all_reduce(inputs, "SUM", EXCHANGE):
                np.testing.assert_array_equal(result, inputs[0] + inputs[1])

    asyncio.run(scenario())


@BOTH
def test_a_rank_that_never_comes_is_named(transport: int) -> None:
    async def scenario() -> None:
        async with ranks(3, transport, stall_timeout_s=0.3) as world:
            requests = world.execute_requests([all_reduce_request((0, 0, 0), 2400, DTYPES["FLOAT64"])])
            work = [asyncio.ensure_future(world.service.Execute(request, None)) for request in requests[:2]]
            results = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 10)
            assert all(isinstance(result, (OperationTimeout, OperationAborted)) for result in results)
            timeouts = [str(result) for result in results if isinstance(result, OperationTimeout)]
            assert any("rank 2" in message or "did not come" in message for message in timeouts), results

    asyncio.run(scenario())


@BOTH
def test_cancelling_one_rank_ends_the_others(transport: int) -> None:
    async def scenario() -> None:
        async with ranks(3, transport, stall_timeout_s=4) as world:
            await write(world.devices[0].arena, 0, np.full(1 << 20, 0x3F, np.uint8))
            requests = world.execute_requests([all_reduce_request((0, 0, 0), 48 << 20, DTYPES["FLOAT64"])])
            work = [asyncio.ensure_future(world.service.Execute(request, None)) for request in requests]
            first = world.devices[1].arena.view(0, 1)
            while first[0] == 0:  # noqa: ASYNC110  memory has no event
                await asyncio.sleep(0)  # until something has reached rank 1
            work[0].cancel()
            results = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 3)
            assert isinstance(results[0], asyncio.CancelledError)
            assert all(isinstance(result, OperationAborted) for result in results[1:])

    asyncio.run(scenario())


def test_slow_is_not_stalled() -> None:
    """An operation may take many times the stall timeout, as long as something moves: 4 MB at 8 MB/s."""

    async def scenario() -> None:
        async with ranks(2, pb.GRPC, slice_bytes=4096, stall_timeout_s=0.2, link=LinkSettings(0.0, 8e6)) as world:
            inputs = [np.ones(500_000), np.ones(500_000)]
            started = asyncio.get_running_loop().time()
            results = await world.all_reduce(inputs, "SUM", "ring")
            assert asyncio.get_running_loop().time() - started > 0.4, "too quick to show anything"
            assert all((result == 2).all() for result in results)

    asyncio.run(scenario())


def test_a_schedule_that_keeps_chunks_back_runs_with_any_number_of_slices() -> None:
    """Rank 1 may apply what rank 0 sends only when its own chunk has left, behind another one that waits in turn."""
    gather = tuple(Transfer(rank, 3, chunk, reduce=True) for chunk in (0, 1) for rank in (0, 1, 2))
    crossing = (
        Transfer(0, 1, 0, reduce=True),
        Transfer(2, 0, 0, reduce=True),
        Transfer(2, 0, 1, reduce=True),
        Transfer(1, 2, 1, reduce=True),
        Transfer(1, 2, 0, reduce=True),
    )
    scatter = tuple(Transfer(3, rank, chunk, reduce=False) for chunk in (0, 1) for rank in (0, 1, 2))
    schedule = Schedule("all_reduce", "crossing", 4, 2, (gather, crossing, scatter))

    async def scenario(transport: int, elements: int, slice_bytes: int = 4096) -> None:
        async with ranks(4, transport, slice_bytes, stall_timeout_s=20) as world:
            inputs = [np.arange(elements) * 1.0 + rank for rank in range(4)]
            for result in await world.all_reduce(inputs, "SUM", schedule):
                np.testing.assert_array_equal(result, np.sum(inputs, axis=0))

    for elements in (1000, 4000, 100_000):
        asyncio.run(scenario(pb.P2P, elements))
        asyncio.run(scenario(pb.GRPC, elements))
    asyncio.run(scenario(pb.GRPC, 4 << 20, 1 << 17))  # more than gRPC's own buffers hold
