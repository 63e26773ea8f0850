"""Groups of cases of collectives, over one memory image for each rank that is compared as a whole."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest

from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import ALGORITHMS, Algorithm
from tests.collectives.harness import Ranks, read, write
from tests.collectives.oracle import OPS, REDUCING, ROOTED, Case, Memory, layout

#: Cases of one group.
GROUP = 60
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
