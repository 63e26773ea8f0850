"""Groups of small operations that travel as one: the same results, in the same places, and nothing else is touched."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from dsml_gpu.coordinator.call import call_of
from dsml_gpu.coordinator.fusion import buckets_of
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import Algorithm
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.groups import BY_ALGORITHM, cases_of, check_group
from tests.collectives.harness import ranks
from tests.collectives.oracle import REDUCING, ROOTED, Case, Memory, layout

NRANKS = 4
#: Neighbours of one type and operator, with one root; the last ones fill several slices.
SIZES = (1, 0, NRANKS - 1, 997, 50, 997)


def neighbours(algorithm: Algorithm, dtype: str, op: str) -> list[Case]:
    cases = cases_of(algorithm, NRANKS, SIZES, [DTYPES[dtype]], [op])
    return [replace(case, root=1) if algorithm.collective in ROOTED else case for case in cases]


@BY_ALGORITHM
@pytest.mark.parametrize("transport", [pb.AUTO, pb.GRPC])
def test_fused_operations_give_what_each_gives_alone(algorithm: Algorithm, transport: int) -> None:
    groups = [neighbours(algorithm, dtype, op) for dtype, op in (("FLOAT32", "SUM"), ("INT8", "AVG"), ("FLOAT16", "MAX"))]
    if algorithm.collective in REDUCING:
        weights = (0.5, 2.0, 1.0, 1.5)
        groups.append([replace(case, weights=weights) for case in neighbours(algorithm, "FLOAT64", "SUM")])

    async def scenario() -> None:
        async with ranks(NRANKS, transport) as world:
            world.fuses = True
            for group in groups:
                await check_group(world, group)

    asyncio.run(scenario())


@BY_ALGORITHM
def test_neighbours_of_one_kind_are_fused(algorithm: Algorithm) -> None:
    """The test above would be none if they were not."""
    memories = [Memory() for _ in range(NRANKS)]
    cases = neighbours(algorithm, "FLOAT32", "SUM")
    calls = [call_of(layout(case, memories), NRANKS) for case in cases]
    buckets = buckets_of(calls)
    assert [call for bucket in buckets for call in bucket] == calls
    if algorithm.collective in ("barrier", "send_recv"):
        assert len(buckets) == len(calls)
    elif algorithm.collective != "all_to_all":  # of which those in place go alone
        assert len(buckets) == 1
