"""The collectives of the Python client against a coordinator in this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsml_gpu import Client, Communicator, DeviceArray
from dsml_gpu.reduction import DTYPES
from dsml_gpu.schedules import COLLECTIVES, algorithms_of, find_algorithm
from dsml_gpu.schedules.cost_model import LINKS_ONLY
from tests.client.collectives import NRANKS, calls, line_broadcast, values
from tests.support.processes import wait_until
from tests.support.rpc import rpc_to
from tests.support.slow_copy import SlowCopy

#: Elements of each rank's block, uneven, one of them empty.
UNEVEN = (5, 0, 3, 2)
EVERY_ROOT = pytest.mark.parametrize("root", range(NRANKS))


def cut(array: np.ndarray, counts: Sequence[int] = UNEVEN) -> list[np.ndarray]:
    """Blocks of an array."""
    return np.split(array, np.cumsum(counts)[:-1])


def assert_hold(arrays: Sequence[DeviceArray], expected: Sequence[np.ndarray]) -> None:
    for rank, (array, right) in enumerate(zip(arrays, expected, strict=True)):
        np.testing.assert_array_equal(array.get(), right, err_msg=f"rank {rank}")


# ---- what they do ----------------------------------------------------------------------------------------------------


def test_all_reduce_out_of_place_leaves_what_it_reads(comm: Communicator) -> None:
    inputs = values(10)
    arrays, out = comm.array(inputs), comm.empty((2, 5))  # another shape, the same size
    comm.all_reduce(arrays, out, op="max")
    assert_hold(arrays, inputs)
    assert_hold(out, [inputs[3].reshape(2, 5)] * NRANKS)


@EVERY_ROOT
@pytest.mark.parametrize("in_place", [False, True])
def test_reduce_writes_on_the_root_only(comm: Communicator, root: int, in_place: bool) -> None:
    inputs = values(7)
    arrays = comm.array(inputs)
    out = arrays[root] if in_place else comm.devices[root].empty(7)
    comm.reduce(arrays, None if in_place else out, root=root)
    np.testing.assert_array_equal(out.get(), np.sum(inputs, axis=0))
    for rank, array in enumerate(arrays):
        if array is not out:
            np.testing.assert_array_equal(array.get(), inputs[rank])


@EVERY_ROOT
@pytest.mark.parametrize("in_place", [False, True])
def test_broadcast(comm: Communicator, root: int, in_place: bool) -> None:
    inputs = values(7)
    arrays = comm.array(inputs)
    source = arrays[root] if in_place else comm.devices[root].array(np.arange(7.0))
    right = source.get()
    comm.broadcast(arrays, None if in_place else source, root=root)
    assert_hold(arrays, [right] * NRANKS)
    np.testing.assert_array_equal(source.get(), right)


@pytest.mark.parametrize("counts", [None, UNEVEN])
def test_reduce_scatter(comm: Communicator, counts: Sequence[int] | None) -> None:
    """Out of place the sizes of the results say what the blocks are."""
    inputs = values(10)
    arrays, out = comm.array(inputs), [device.empty(count) for device, count in zip(comm.devices, UNEVEN, strict=True)]
    comm.reduce_scatter(arrays, out, counts=counts, op="min")
    assert_hold(arrays, inputs)
    assert_hold(out, cut(inputs[0]))


@pytest.mark.parametrize("counts", [None, (5, 0, 4, 3)])
def test_reduce_scatter_in_place_writes_a_ranks_own_block(comm: Communicator, counts: Sequence[int] | None) -> None:
    inputs = values(12)
    arrays = comm.array(inputs)
    comm.reduce_scatter(arrays, counts=counts)
    sums = cut(np.sum(inputs, axis=0), counts or (3,) * NRANKS)
    for rank, array in enumerate(arrays):
        blocks = cut(inputs[rank], counts or (3,) * NRANKS)
        blocks[rank] = sums[rank]
        np.testing.assert_array_equal(array.get(), np.concatenate(blocks), err_msg=f"rank {rank}")


@pytest.mark.parametrize("counts", [None, UNEVEN])
def test_all_gather(comm: Communicator, counts: Sequence[int] | None) -> None:
    blocks = cut(np.arange(10.0))
    arrays, out = comm.array(blocks), comm.empty(10)
    comm.all_gather(arrays, out, counts=counts)
    assert_hold(arrays, blocks)
    assert_hold(out, [np.arange(10.0)] * NRANKS)


@pytest.mark.parametrize("counts", [None, (5, 0, 4, 3)])
def test_all_gather_in_place(comm: Communicator, counts: Sequence[int] | None) -> None:
    inputs = values(12)
    arrays = comm.array(inputs)
    comm.all_gather(arrays, counts=counts)
    right = np.concatenate([cut(inputs[rank], counts or (3,) * NRANKS)[rank] for rank in range(NRANKS)])
    assert_hold(arrays, [right] * NRANKS)


@EVERY_ROOT
@pytest.mark.parametrize("counts", [None, UNEVEN])
def test_gather(comm: Communicator, root: int, counts: Sequence[int] | None) -> None:
    blocks = cut(np.arange(10.0))
    arrays, out = comm.array(blocks), comm.devices[root].empty(10)
    comm.gather(arrays, out, root=root, counts=counts)
    assert_hold(arrays, blocks)
    np.testing.assert_array_equal(out.get(), np.arange(10.0))


@EVERY_ROOT
@pytest.mark.parametrize("counts", [None, UNEVEN])
def test_gather_in_place(comm: Communicator, root: int, counts: Sequence[int] | None) -> None:
    """Without counts, the root's block is what the others' leave of its array."""
    blocks = cut(np.arange(10.0))
    before: list[np.ndarray] = [*blocks]
    before[root] = np.concatenate([block if rank == root else -block for rank, block in enumerate(blocks)])
    arrays = comm.array(before)
    comm.gather(arrays, root=root, counts=counts)
    before[root] = np.arange(10.0)
    assert_hold(arrays, before)


@EVERY_ROOT
@pytest.mark.parametrize("counts", [None, UNEVEN])
@pytest.mark.parametrize("in_place", [False, True])
def test_scatter(comm: Communicator, root: int, counts: Sequence[int] | None, in_place: bool) -> None:
    source = comm.devices[root].array(np.arange(10.0))
    arrays = [device.empty(count) for device, count in zip(comm.devices, UNEVEN, strict=True)]
    targets: list[DeviceArray | None] = [*arrays]
    if in_place:
        targets[root] = None
        arrays[root].set(cut(np.arange(10.0))[root])
    comm.scatter(source, targets, root=root, counts=counts)
    assert_hold(arrays, cut(np.arange(10.0)))
    np.testing.assert_array_equal(source.get(), np.arange(10.0))


@pytest.mark.parametrize("in_place", [False, True])
def test_all_to_all(comm: Communicator, in_place: bool) -> None:
    inputs = values(8)
    arrays = comm.array(inputs)
    out = arrays if in_place else comm.empty(8)
    comm.all_to_all(arrays, None if in_place else out)
    assert_hold(
        out, [np.concatenate([inputs[src][2 * dst : 2 * dst + 2] for src in range(NRANKS)]) for dst in range(NRANKS)]
    )
    if not in_place:
        assert_hold(arrays, inputs)


@pytest.mark.parametrize("in_place", [False, True])
def test_all_to_all_of_uneven_blocks(comm: Communicator, in_place: bool) -> None:
    counts = [[0, 1, 2, 3], [1, 5, 0, 4], [2, 0, 0, 7], [3, 4, 7, 1]]
    inputs = [np.arange(float(sum(row))) + 100 * rank for rank, row in enumerate(counts)]
    arrays = comm.array(inputs)
    if in_place:
        out = arrays
        comm.all_to_all(arrays, counts=counts)
    else:
        counts[0] = [3, 1, 2, 0]
        out = [device.empty(sum(column)) for device, column in zip(comm.devices, zip(*counts, strict=True), strict=True)]
        comm.all_to_all(arrays, out, counts=counts)
    rows = [cut(values, row) for values, row in zip(inputs, counts, strict=True)]
    assert_hold(out, [np.concatenate([row[rank] for row in rows]) for rank in range(NRANKS)])


def test_send_recv_of_many_pairs(comm: Communicator) -> None:
    """Round the ring, to itself, to where it is already, and two from one array, all of different sizes."""
    sources = [device.array(np.arange(3.0 + rank) * (rank + 1)) for rank, device in enumerate(comm.devices)]
    pairs = [(source, comm.devices[(rank + 1) % NRANKS].empty(3 + rank)) for rank, source in enumerate(sources)]
    pairs += [(sources[2], comm.devices[2].empty(5)), (sources[1], sources[1]), (sources[0], comm.devices[3].empty(3))]
    before = [source.get() for source, _ in pairs]
    result = comm.send_recv(pairs)
    assert result is not None
    assert result.bytes_sent == (3 + 4 + 5 + 6 + 3) * 8  # what stays on a rank is not sent
    assert_hold([destination for _, destination in pairs], before)
    assert_hold([source for source, _ in pairs], before)


def test_send_is_one_pair_and_a_group_of_them_moves_together(comm: Communicator) -> None:
    arrays, out = comm.array(values(3)), comm.empty(3)
    assert comm.send(arrays[0], out[2]) is not None
    np.testing.assert_array_equal(out[2].get(), values(3)[0])
    with comm.group() as group:
        for rank in range(NRANKS):
            assert comm.send(arrays[rank], out[3 - rank]) is None
    assert_hold(out, values(3)[::-1])
    assert group.result is not None
    assert [one.collective for one in group.result.operations] == ["send_recv"] * NRANKS


@pytest.mark.parametrize("held", range(NRANKS))
@pytest.mark.parametrize("algorithm", sorted(algorithms_of("barrier")))
def test_a_barrier_waits_for_earlier_work_on_every_device(
    client: Client, comm: Communicator, held: int, algorithm: str
) -> None:
    """A copy to one device has begun and does not end: others' collectives run, and the barrier does not return."""
    comm.barrier(algorithm=algorithm)
    assert comm.status() == ("SUCCESS", "")
    with rpc_to(client.target) as rpc, ThreadPoolExecutor(1) as pool, client.communicator(2) as others:
        copy = SlowCopy(rpc.coordinator, comm.devices[held].metadata, 8)
        barrier = pool.submit(comm.barrier, algorithm=algorithm)
        try:
            wait_until(lambda: comm.status() == ("IN_PROGRESS", ""), "the beginning of the barrier")
            for _ in range(20):
                others.barrier()
                assert not barrier.done()
        finally:
            copy.finish()
        assert barrier.result(10) is not None
        assert comm.status() == ("SUCCESS", "")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_weights(comm: Communicator, dtype: np.dtype[Any]) -> None:
    """Each counts as often as its weight says; a reduce-scatter and a reduce weigh as an all-reduce does."""
    weights: Any = np.array([1, 0, 3, 2] if dtype.kind in "iu" else [0.5, 0, -1, 2])
    rows = [np.arange(8) + 2 * rank for rank in range(NRANKS)]
    inputs, right = [row.astype(dtype) for row in rows], (weights @ rows).astype(dtype)
    arrays = comm.array(inputs)
    comm.reduce(arrays, out := comm.devices[1].empty(8, dtype), root=1, weights=weights)
    np.testing.assert_array_equal(out.get(), right)
    comm.reduce_scatter(arrays, blocks := comm.empty(2, dtype), weights=weights.tolist())
    assert_hold(blocks, np.split(right, NRANKS))
    assert_hold(arrays, inputs)
    comm.all_reduce(arrays, weights=tuple(weights))
    assert_hold(arrays, [right] * NRANKS)


# ---- by which algorithm ----------------------------------------------------------------------------------------------


def test_every_collective_has_a_method(comm: Communicator) -> None:
    assert {*calls(comm)} == {*COLLECTIVES}


@pytest.mark.parametrize("size", [0, NRANKS, 40_000])
@pytest.mark.parametrize("collective", [*COLLECTIVES])
def test_the_algorithm_is_chosen_with_a_reason(comm: Communicator, collective: str, size: int) -> None:
    for options in ({}, {"algorithm": "auto"}):
        result = calls(comm, size)[collective](**options)
        assert result is not None
        (operation,) = result.operations
        assert operation.collective == collective
        assert operation.algorithm == result.algorithm
        assert operation.algorithm in algorithms_of(collective)
        assert operation.reason == result.reason
        assert operation.reason.startswith("predicted ")
        assert operation.predicted_s > 0


@pytest.mark.parametrize(
    ("collective", "algorithm"), [(collective, name) for collective in COLLECTIVES for name in algorithms_of(collective)]
)
def test_every_algorithm_can_be_asked_for(comm: Communicator, collective: str, algorithm: str) -> None:
    result = calls(comm)[collective](algorithm=algorithm)
    assert result is not None
    (operation,) = result.operations
    assert (operation.collective, operation.algorithm, operation.reason) == (collective, algorithm, "as asked")
    assert (result.algorithm, result.reason, operation.predicted_s) == (algorithm, "as asked", 0)


def test_the_coordinators_cost_model_can_be_replaced(client: Client, comm: Communicator) -> None:
    before = client.cost_model()
    slower = replace(before, p2p=replace(before.p2p, operation_s=before.p2p.operation_s + 1))
    first = calls(comm)["all_reduce"]()
    try:
        client.set_cost_model(slower)
        assert client.cost_model() == slower
        second = calls(comm)["all_reduce"]()
        client.set_cost_model(LINKS_ONLY)
        third = calls(comm)["all_reduce"]()
    finally:
        client.set_cost_model(before)
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.operations[0].predicted_s == pytest.approx(first.operations[0].predicted_s + 1)
    assert third.operations[0].predicted_s == 0


def test_a_schedule_of_ones_own(comm: Communicator) -> None:
    inputs = values(1000)
    arrays = comm.array(inputs)
    result = comm.broadcast(arrays, root=2, algorithm=line_broadcast(2))
    assert_hold(arrays, [inputs[2]] * NRANKS)
    assert result is not None
    assert (result.algorithm, result.reason) == ("my_line", "the caller's own schedule")
    assert result.bytes_sent == 3 * 8000


@pytest.mark.parametrize("collective", [*COLLECTIVES])
def test_every_collective_takes_a_schedule_of_ones_own(comm: Communicator, collective: str) -> None:
    name = next(iter(algorithms_of(collective)))
    schedule = find_algorithm(collective, name).schedule(NRANKS, pairs=((0, 1),) if collective == "send_recv" else ())
    result = calls(comm)[collective](algorithm=schedule)
    assert result is not None
    assert (result.algorithm, result.reason) == (name, "the caller's own schedule")


def test_a_group_tells_of_each_of_its_operations(comm: Communicator) -> None:
    inputs = values(8)
    arrays, out = comm.array(inputs), comm.empty(8)
    with comm.group() as group:
        assert comm.reduce_scatter(arrays, algorithm="direct") is None
        assert comm.all_gather(arrays, algorithm="bruck") is None
        assert comm.all_to_all(arrays, out) is None
        assert comm.barrier() is None
        assert comm.broadcast(out, root=1, algorithm=line_broadcast(1)) is None
        assert_hold(arrays, inputs)  # nothing has run yet
    total = np.sum(inputs, axis=0)
    assert_hold(arrays, [total] * NRANKS)
    assert_hold(out, [np.tile(total[2:4], NRANKS)] * NRANKS)
    result = group.result
    assert result is not None
    assert result.algorithm == ""
    chosen = [(operation.collective, operation.algorithm) for operation in result.operations]
    assert chosen[:2] == [("reduce_scatter", "direct"), ("all_gather", "bruck")]
    assert [collective for collective, _ in chosen[2:]] == ["all_to_all", "barrier", "broadcast"]
    assert chosen[4][1] == "my_line"
    reasons = [operation.reason for operation in result.operations]
    assert reasons[:2] == ["as asked"] * 2
    assert all(reason.startswith("predicted ") for reason in reasons[2:4])
    assert result.reason == "; ".join(dict.fromkeys(reasons))


def test_a_group_by_one_algorithm_has_its_name(comm: Communicator) -> None:
    arrays = comm.empty(4)
    with comm.group() as group:
        comm.all_gather(arrays, algorithm="ring")
        comm.all_reduce(arrays, algorithm="ring")
    assert group.result is not None
    assert (group.result.algorithm, group.result.reason) == ("ring", "as asked")
