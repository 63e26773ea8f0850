"""Collectives between processes, over gRPC and through the Python client, against numpy.

There are far too many combinations of algorithm, type, operator, place, size and root for processes. `covering_rows` chooses
those in which every two values come together, so each type meets each operator, each algorithm each size, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator, DeviceArray
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import COLLECTIVES, algorithms_of
from tests.collectives.oracle import OPS, REDUCING, ROOTED, Case, buffers_of, values_for
from tests.collectives.pairwise import covering_rows

MIB = 1 << 20
PRIME = 7919
#: Elements of the largest buffer.
SIZES: dict[str, Callable[[int, int], int]] = {
    "nothing": lambda nranks, itemsize: 0,
    "one element": lambda nranks, itemsize: 1,
    "fewer than ranks": lambda nranks, itemsize: nranks - 1,
    "a prime number": lambda nranks, itemsize: PRIME,
    "1 MiB": lambda nranks, itemsize: MIB // itemsize,
}
ROOTS: dict[str, Callable[[int], int]] = {
    "first": lambda nranks: 0,
    "middle": lambda nranks: 1,
    "last": lambda nranks: nranks - 1,
}


@pytest.fixture(scope="module")
def fleets(compiling_servers: None) -> Iterator[dict[int, Client]]:
    """A fleet of three device processes and one of four, by their number of ranks."""
    memory = ["--memory", "256MiB"]
    with (
        Fleet(3, memory) as three,
        Fleet(4, memory) as four,
        dsml_gpu.connect(three.address) as of_three,
        dsml_gpu.connect(four.address) as of_four,
    ):
        yield {3: of_three, 4: of_four}


def factors_of(collective: str) -> dict[str, Sequence[Any]]:
    """What varies in a collective."""
    factors: dict[str, Sequence[Any]] = {
        "nranks": (3, 4),
        "transport": ("auto", "grpc"),
        "algorithm": [*algorithms_of(collective)],
    }
    if collective != "barrier":
        factors |= {"dtype": [*DTYPES], "size": [*SIZES], "in_place": (False, True)}
    if collective in REDUCING:
        factors["op"] = OPS
    if collective in ROOTED:
        factors["root"] = [*ROOTS]
    return factors


def case_of(collective: str, row: dict[str, Any]) -> Case:
    nranks, dtype = row["nranks"], DTYPES[row.get("dtype", "UINT8")]
    total = SIZES[row.get("size", "nothing")](nranks, dtype.itemsize)
    pairs: tuple[tuple[int, int], ...] = ()
    if collective in ("all_reduce", "reduce", "broadcast", "barrier"):
        counts: tuple[int, ...] = (total,)
    elif collective == "send_recv":
        pairs = (*((rank, (rank + 1) % nranks) for rank in range(nranks)), (0, nranks - 1), (1, 1))
        counts = spread(total, len(pairs))
    elif collective == "all_to_all":
        counts = spread(total, nranks**2)
        if row["in_place"]:  # each rank gets as much as it gives
            square = np.array(counts).reshape(nranks, nranks)
            counts = tuple((np.tril(square) + np.tril(square, -1).T).flat)
    else:
        counts = spread(total, nranks)
    return Case(
        collective,
        row["algorithm"],
        nranks,
        counts,
        dtype,
        op=row.get("op", "SUM"),
        root=ROOTS[row.get("root", "first")](nranks),
        in_place=row.get("in_place", False),
        pairs=pairs,
    )


def spread(total: int, nblocks: int) -> tuple[int, ...]:
    """`total` elements over blocks of different sizes, some of them empty."""
    edges = [total * (block**2 % (nblocks + 1)) // (nblocks + 1) for block in range(1, nblocks)]
    return tuple(int(count) for count in np.diff([0, *sorted(edges), total]))


@pytest.mark.parametrize("collective", [*COLLECTIVES])
def test_the_cases_cover_every_two_values(collective: str) -> None:
    factors = factors_of(collective)
    rows = covering_rows(factors)
    for one, other in itertools.combinations(factors, 2):
        assert {(row[one], row[other]) for row in rows} == {*itertools.product(factors[one], factors[other])}
    assert len(rows) <= 1.25 * max(
        len(factors[one]) * len(factors[other]) for one, other in itertools.combinations(factors, 2)
    )


@pytest.mark.parametrize("collective", [*COLLECTIVES])
def test_between_processes(fleets: dict[int, Client], collective: str) -> None:
    rows = covering_rows(factors_of(collective))
    assert {row["algorithm"] for row in rows} == {*algorithms_of(collective)}
    for (nranks, client), transport in itertools.product(fleets.items(), ("auto", "grpc")):
        with client.communicator(nranks, transport=transport) as comm:
            for row in rows:
                if (row["nranks"], row["transport"]) == (nranks, transport):
                    check(comm, case_of(collective, row), transport)


def check(comm: Communicator, case: Case, transport: str) -> None:
    """Runs a case, and compares what it gives and what it must not change."""
    if case.collective == "barrier":
        result, expected = comm.barrier(algorithm=case.algorithm), []
    elif case.collective == "send_recv":
        result, expected = _send_recv(comm, case)
    else:
        result, expected = _with_buffers(comm, case)
    assert result is not None
    (operation,) = result.operations
    assert (operation.collective, operation.algorithm, operation.reason) == (case.collective, case.algorithm, "as asked")
    copies_first = case.collective == "all_to_all" and case.in_place
    one_pass = transport == "auto" and case.algorithm == "direct" and not copies_first
    assert result.transports == (("p2p" if one_pass else "grpc",) if result.bytes_sent else ())
    if sum(case.counts) > case.nranks**2:
        assert result.bytes_sent > 0
    for array, values in expected:
        actual = array.get()
        assert actual.tobytes() == values.tobytes(), f"{case}: {array} holds {actual}, expected {values}"


#: Arrays, and what they must hold afterwards.
Expected = list[tuple[DeviceArray, np.ndarray]]


def _send_recv(comm: Communicator, case: Case) -> tuple[dsml_gpu.CollectiveResult | None, Expected]:
    pairs, expected = [], []
    for number, ((src, dst), count) in enumerate(zip(case.pairs, case.counts, strict=True)):
        values = values_for(case.dtype, case.op, count, [number, src, dst, count])
        source = comm.devices[src].array(values)
        destination = source if case.in_place and src == dst else comm.devices[dst].empty(count, case.dtype)
        pairs.append((source, destination))
        expected += [(source, values), (destination, values)]
    return comm.send_recv(pairs, algorithm=case.algorithm), expected


def _with_buffers(comm: Communicator, case: Case) -> tuple[dsml_gpu.CollectiveResult | None, Expected]:
    send: list[Any] = [None] * case.nranks
    recv: list[Any] = [None] * case.nranks
    expected: Expected = []
    for rank, (values, result) in enumerate(zip(*buffers_of(case), strict=True)):
        device = comm.devices[rank]
        if case.in_place and values is not None and result is not None:
            before, after = _in_one_array(case, rank, values, result)
            send[rank] = recv[rank] = device.array(before)
            expected.append((send[rank], after))
            continue
        if values is not None:
            send[rank] = device.array(values)
            expected.append((send[rank], values))
        if result is not None:
            recv[rank] = device.array(np.ones(result.size, case.dtype))
            expected.append((recv[rank], result))
    return _call(comm, case, send, recv), expected


def _in_one_array(case: Case, rank: int, values: np.ndarray, result: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an array holds before and after: the smaller one of the two is in it where the rank's own block is."""
    size = max(values.size, result.size)

    def place_of(array: np.ndarray) -> slice:
        start = 0 if array.size == size else sum(case.counts[:rank])
        return slice(start, start + array.size)

    before = np.ones(size, case.dtype)
    before[place_of(values)] = values
    after = before.copy()
    after[place_of(result)] = result
    return before, after


def _call(comm: Communicator, case: Case, send: list[Any], recv: list[Any]) -> dsml_gpu.CollectiveResult | None:
    """The client's method for a case. In place, both lists have the same array where a rank has both."""
    method, root, nranks = getattr(comm, case.collective), case.root, case.nranks
    options: dict[str, Any] = {"algorithm": case.algorithm}
    if case.collective in REDUCING:
        options["op"] = case.op.lower()
    if case.collective in ROOTED:
        options["root"] = root
    if case.collective in ("reduce_scatter", "all_gather", "gather", "scatter"):
        options["counts"] = case.counts
    if case.collective == "all_to_all":
        options["counts"] = np.reshape(case.counts, (nranks, nranks)).tolist()
    if case.collective == "broadcast":
        return method(recv, None if case.in_place else send[root], **options)
    if case.collective in ("reduce", "gather"):
        return method(send, None if case.in_place else recv[root], **options)
    if case.collective == "scatter":
        stays = root if case.in_place else None
        return method(send[root], [None if rank == stays else array for rank, array in enumerate(recv)], **options)
    if case.in_place:
        return method(recv if case.collective == "all_gather" else send, **options)
    return method(send, recv, **options)
