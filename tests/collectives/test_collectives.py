"""Every collective against numpy: algorithms, types, operators, places, roots, numbers of ranks and sizes.

Many cases run as one group over one memory image for each rank, which is compared as a whole: what is written beside the
outputs, or into an input, shows.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest

from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import ALGORITHMS, Algorithm
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.groups import BY_ALGORITHM, cases_of, check_group, in_groups, sizes_for
from tests.collectives.harness import Ranks, ranks
from tests.collectives.oracle import OPS, REDUCING, Case

MIB = 1 << 20


@BY_ALGORITHM
def test_every_type_operator_place_and_size_in_process(algorithm: Algorithm) -> None:
    async def scenario() -> None:
        for nranks in range(1, 10):
            async with ranks(nranks, pb.AUTO) as world:
                for group in in_groups(cases_of(algorithm, nranks, sizes_for(nranks), DTYPES.values())):
                    await check_group(world, group)

    asyncio.run(scenario())


@BY_ALGORITHM
def test_large_buffers_in_process(algorithm: Algorithm) -> None:
    """1 MiB, in and out of place, each number of ranks with another type and operator."""

    async def scenario() -> None:
        names = itertools.cycle(DTYPES.values())
        for nranks, op in zip(range(1, 10), itertools.cycle(OPS)):
            dtype = next(names)
            async with ranks(nranks, pb.AUTO, slice_bytes=64 << 10) as world:
                await check_group(world, list(cases_of(algorithm, nranks, [MIB // dtype.itemsize], [dtype], [op])))

    asyncio.run(scenario())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@BY_ALGORITHM
def test_large_buffers_of_every_type_and_operator_in_process(algorithm: Algorithm) -> None:
    async def scenario() -> None:
        for nranks in range(1, 10):
            async with ranks(nranks, pb.AUTO, slice_bytes=64 << 10, memory_bytes=1 << 30) as world:
                for dtype in DTYPES.values():
                    await check_group(world, list(cases_of(algorithm, nranks, [MIB // dtype.itemsize], [dtype])))

    asyncio.run(scenario())


@BY_ALGORITHM
def test_over_grpc_streams(algorithm: Algorithm) -> None:
    """Each number of ranks with other types and operators, of many slices and of none."""

    async def scenario() -> None:
        dtypes = list(DTYPES.values())
        for nranks in (2, 3, 5, 8):
            async with ranks(nranks, pb.GRPC) as world:
                cases = [
                    case
                    for number, dtype in enumerate(dtypes)
                    for case in cases_of(
                        algorithm, nranks, [(0, 1, nranks - 1, 7919)[number % 4]], [dtype], [OPS[number % 5]]
                    )
                ]
                await check_group(world, cases)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("nranks", "hosts"),
    [
        (4, (0, 0, 1, 1)),
        (4, (0, 1, 0, 1)),
        (6, (0, 0, 0, 1, 1, 1)),
        (5, (0, 0, 0, 1, 1)),
        (7, (2, 0, 1, 1, 2, 0, 0)),
        (3, (0, 1, 2)),
    ],
)
def test_hierarchies(nranks: int, hosts: tuple[int, ...]) -> None:
    hierarchical = [algorithm for algorithm in ALGORITHMS if algorithm.name == "hierarchical"]
    assert hierarchical

    async def scenario() -> None:
        async with ranks(nranks, pb.AUTO) as world:
            for algorithm in hierarchical:
                cases = cases_of(algorithm, nranks, sizes_for(nranks), [DTYPES["FLOAT32"], DTYPES["INT8"]])
                await check_group(world, list(cases), hosts)

    asyncio.run(scenario())


@BY_ALGORITHM
def test_a_pre_multiplied_sum(algorithm: Algorithm) -> None:
    if algorithm.collective not in REDUCING:
        # Nothing else reduces; that they refuse weights is tested with the refusals.
        return

    async def scenario() -> None:
        for nranks in (1, 2, 3, 5, 8):
            async with ranks(nranks, pb.AUTO) as world:
                cases = []
                for case in cases_of(algorithm, nranks, [1, 300], DTYPES.values(), ["SUM"]):
                    scale = 1 if case.dtype.kind in "iu" else 0.5
                    weights = tuple(scale * (1 + rank % 3) for rank in range(nranks))
                    cases.append(Case(**{**vars(case), "weights": weights}))
                await check_group(world, cases)

    asyncio.run(scenario())


def test_the_comparison_sees_one_wrong_byte() -> None:
    """Beside an output, in an output, and in an input."""

    class Slip(Ranks):
        addr = 0

        async def run(self, requests: Sequence[pb.CollectiveRequest], hosts: Sequence[int] = ()) -> None:
            await super().run(requests, hosts)
            self.devices[1].arena.view(self.addr, 1)[0] ^= 1

    async def scenario(addr: int) -> None:
        async with ranks(2, pb.AUTO) as world:
            world.__class__, world.addr = Slip, addr  # type: ignore[attr-defined]
            with pytest.raises(AssertionError, match=f"rank 1: byte {addr} "):
                await check_group(world, [Case("all_reduce", "ring", 2, (4,), DTYPES["FLOAT64"])])

    for addr in (0, 33, 50):  # the input is at 0 .. 32, the output at 48 .. 80
        asyncio.run(scenario(addr))
