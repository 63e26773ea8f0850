"""Every collective against numpy: algorithms, types, operators, places, roots, numbers of ranks and sizes.

Many cases run as one group over one memory image for each rank, which is compared as a whole: what is written beside the
outputs, or into an input, shows.
"""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest

from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import ALGORITHMS, Algorithm
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.harness import Ranks, ranks, read, write
from tests.collectives.oracle import OPS, REDUCING, ROOTED, Case, Memory, layout

#: Cases of one group.
GROUP = 60
MIB = 1 << 20
BY_ALGORITHM = pytest.mark.parametrize(
    "algorithm", ALGORITHMS, ids=[f"{algorithm.collective}-{algorithm.name}" for algorithm in ALGORITHMS]
)


async def check_group(world: Ranks, cases: Sequence[Case], hosts: Sequence[int] = ()) -> None:
    """Runs the cases as one group, and compares all of memory."""
    memories = [Memory() for _ in world.devices]
    requests = [layout(case, memories) for case in cases]
    ends = [[len(memory.before) for memory in memories]]
    for device, memory in zip(world.devices, memories, strict=True):
        await write(device.arena, 0, np.frombuffer(bytes(memory.before), np.uint8))
    await world.run(requests, hosts)
    for rank, (device, memory) in enumerate(zip(world.devices, memories, strict=True)):
        actual = await read(device.arena, 0, DTYPES["UINT8"], len(memory.after))
        wrong = np.flatnonzero(actual != np.frombuffer(bytes(memory.after), np.uint8))
        assert not wrong.size, f"rank {rank}: byte {wrong[0]} of {ends[0][rank]} is wrong, and {wrong.size} in all; of " + (
            "; ".join(map(str, cases)) if len(cases) < 4 else f"{cases[0]} ... {cases[-1]}"
        )


def cases_of(
    algorithm: Algorithm, nranks: int, sizes: Iterable[int], dtypes: Iterable[np.dtype], ops: Sequence[str] = OPS
) -> Iterator[Case]:
    """One algorithm with every type, operator and size, in and out of place; roots and the uneven shapes take turns."""
    name = algorithm.collective
    turn = itertools.count(zlib.crc32(algorithm.name.encode()))
    for dtype, op, size, in_place in itertools.product(dtypes, ops if name in REDUCING else ops[:1], sizes, (False, True)):
        number = next(turn)
        root = number % nranks if name in ROOTED else 0
        pairs: tuple[tuple[int, int], ...] = ()
        if name in ("all_reduce", "reduce", "broadcast", "barrier"):
            counts: tuple[int, ...] = (size,)
        elif name == "all_to_all":
            counts = _spread(size, nranks**2, uneven=number % 3 > 0)
        elif name == "send_recv":
            pairs = (*tuple((rank, (rank * (1 + number % 3) + number) % nranks) for rank in range(nranks)), (0, nranks - 1))
            counts = _spread(size * len(pairs), len(pairs), uneven=number % 3 > 0)
        else:
            counts = _spread(size, nranks, uneven=number % 3 > 0)
        if in_place and name == "broadcast" and nranks == 1:
            in_place = False
        yield Case(name, algorithm.name, nranks, counts, dtype, op, root, in_place, pairs)


def _spread(total: int, nblocks: int, uneven: bool) -> tuple[int, ...]:
    """`total` elements over blocks: all the same (rounded up), or uneven, some of them empty."""
    if not uneven:
        return (-(-total // nblocks),) * nblocks
    shares = [(7 * block + 3) % 5 for block in range(nblocks)]
    counts = [total * share // (sum(shares) or 1) for share in shares]
    return (*counts[:-1], counts[-1] + total - sum(counts))


def sizes_for(nranks: int) -> list[int]:
    return sorted({0, 1, nranks - 1, 997})


def in_groups(cases: Iterable[Case]) -> Iterator[list[Case]]:
    iterator = iter(cases)
    while group := list(itertools.islice(iterator, GROUP)):
        yield group


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
