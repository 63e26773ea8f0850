"""What the collectives of the Python client refuse, and how they fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator, DeviceArray, errors
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.schedules import COLLECTIVES, Schedule, Transfer, algorithms_of, find_algorithm
from tests.client.collectives import NRANKS, calls, line_broadcast, values
from tests.support.rpc import rpc_to
from tests.support.slow_copy import SlowCopy

Wrong = tuple[Callable[[Communicator], Any], type[Exception], str]


def views(arrays: list[DeviceArray], skipped: int, size: int) -> list[DeviceArray]:
    """Other elements of the same memory."""
    return [DeviceArray(array.device, array.addr + skipped * array.dtype.itemsize, (size,), array.dtype) for array in arrays]


def freed(arrays: list[DeviceArray]) -> list[DeviceArray]:
    for array in arrays:
        array.free()
    return arrays


def one_type_of_others(comm: Communicator) -> list[DeviceArray]:
    return [*comm.empty(4)[:3], comm.devices[3].empty(4, np.float32)]


WRONG_ARRAYS: dict[str, Wrong] = {
    "no arrays at all": (lambda c: c.all_reduce([]), errors.RankMismatch, "4 ranks need one array each, got 0"),
    "all_reduce of three": (lambda c: c.all_reduce(c.empty(4)[:3]), errors.RankMismatch, "got 3"),
    "all_reduce into three": (lambda c: c.all_reduce(c.empty(4), c.empty(4)[:3]), errors.RankMismatch, "got 3"),
    "all_reduce into none": (lambda c: c.all_reduce(c.empty(4), []), errors.RankMismatch, "got 0"),
    "reduce of three": (lambda c: c.reduce(c.empty(4)[:3]), errors.RankMismatch, "got 3"),
    "reduce of too few for the root": (
        lambda c: c.reduce(c.empty(4)[:3], root=3),
        errors.RankMismatch,
        "rank 3 has no array",
    ),
    "broadcast to five": (lambda c: c.broadcast([*c.empty(4), *c.empty(4)[:1]]), errors.RankMismatch, "got 5"),
    "reduce_scatter of three": (lambda c: c.reduce_scatter(c.empty(4)[:3]), errors.RankMismatch, "got 3"),
    "reduce_scatter into none": (lambda c: c.reduce_scatter(c.empty(4), ()), errors.RankMismatch, "got 0"),
    "all_gather into three": (lambda c: c.all_gather(c.empty(1), c.empty(4)[:3]), errors.RankMismatch, "got 3"),
    "gather of three": (lambda c: c.gather(c.empty(1)[:3], c.devices[0].empty(4)), errors.RankMismatch, "got 3"),
    "scatter to three": (lambda c: c.scatter(c.devices[0].empty(4), c.empty(1)[:3]), errors.RankMismatch, "got 3"),
    "scatter to nowhere": (
        lambda c: c.scatter(c.devices[0].empty(4), [*c.empty(1)[:3], None]),
        errors.RankMismatch,
        "only the root's array may be None",
    ),
    "all_to_all of three": (lambda c: c.all_to_all(c.empty(4)[:3]), errors.RankMismatch, "got 3"),
    "on another rank's device": (
        lambda c: c.all_gather(c.empty(4)[::-1]),
        errors.RankMismatch,
        r"rank 0 is device \d+, but its array is on device \d+",
    ),
    "result on another rank's device": (
        lambda c: c.reduce(c.empty(4), c.devices[0].empty(4), root=1),
        errors.RankMismatch,
        r"rank 1 is device \d+, but its array is on device \d+",
    ),
    "other types": (
        lambda c: c.all_gather(one_type_of_others(c)),
        errors.InvalidValue,
        "rank 0 has 4 of float64, rank 3 has 4 of float32",
    ),
    "another type of the result": (
        lambda c: c.all_to_all(c.empty(4), c.empty(4, np.int64)),
        errors.InvalidValue,
        "rank 0 has 4 of float64, rank 0 has 4 of int64",
    ),
    "a type that the wire has not": (
        lambda c: c.broadcast(c.empty(4, np.int16)),
        errors.InvalidValue,
        "int16 has no place on the wire",
    ),
    "other sizes": (
        lambda c: c.broadcast([*c.empty(4)[:3], c.devices[3].empty(5)]),
        errors.InvalidValue,
        "rank 0 has 4 of float64, rank 3 has 5 of float64",
    ),
    "another size of the result": (
        lambda c: c.reduce(c.empty(4), c.devices[1].empty(5), root=1),
        errors.InvalidValue,
        "rank 0 has 4 of float64, rank 1 has 5 of float64",
    ),
    "blocks that do not make the whole": (
        lambda c: c.all_gather(c.empty(2), c.empty(7)),
        errors.InvalidValue,
        "array 0 must have 8 elements, not 7",
    ),
    "parts of no whole number": (
        lambda c: c.reduce_scatter(c.empty(6)),
        errors.InvalidValue,
        "6 elements are no multiple of 4 ranks; give counts",
    ),
    "a whole that is too small": (
        lambda c: c.gather(c.empty(2), root=1),
        errors.InvalidValue,
        "6 elements of other ranks do not fit into 2",
    ),
    "three counts": (
        lambda c: c.all_gather(c.empty(4), counts=[1, 1, 2]),
        errors.InvalidValue,
        "4 ranks need one count each",
    ),
    "a count below 0": (lambda c: c.all_gather(c.empty(4), counts=[1, 1, 3, -1]), errors.InvalidValue, "of 0 or more"),
    "counts of other blocks": (
        lambda c: c.reduce_scatter(c.empty(4), c.empty(1), counts=[2, 1, 1, 0]),
        errors.InvalidValue,
        "array 0 must have 2 elements, not 1",
    ),
    "counts of another whole": (
        lambda c: c.scatter(c.devices[0].empty(5), c.empty(1), counts=[1] * 4),
        errors.InvalidValue,
        "array 0 must have 4 elements, not 5",
    ),
    "a row of counts too few": (
        lambda c: c.all_to_all(c.empty(4), counts=[[1] * 4] * 3),
        errors.RankMismatch,
        r"4 rows of 4, got rows of \[4, 4, 4\]",
    ),
    "a row of three": (
        lambda c: c.all_to_all(c.empty(4), counts=[[1] * 4, [1] * 4, [1] * 4, [1] * 3]),
        errors.RankMismatch,
        r"4 rows of 4, got rows of \[4, 4, 4, 3\]",
    ),
    "a count below 0 in a row": (
        lambda c: c.all_to_all(c.empty(4), counts=[[1, 1, 3, -1]] * 4),
        errors.InvalidValue,
        "0 or more, got -1",
    ),
    "rows that are too long": (
        lambda c: c.all_to_all(c.empty(4), counts=[[2] * 4] * 4),
        errors.InvalidValue,
        "array 0 must have 8 elements, not 4",
    ),
    "no pairs": (lambda c: c.send_recv([]), errors.InvalidValue, "at least one pair"),
    "a pair of two sizes": (
        lambda c: c.send(c.devices[0].empty(3), c.devices[1].empty(4)),
        errors.InvalidValue,
        "got 3 of float64 and 4 of float64",
    ),
    "pairs of two types": (
        lambda c: c.send_recv(list(zip(one_type_of_others(c), one_type_of_others(c), strict=True))),
        errors.InvalidValue,
        "must be of type float64",
    ),
    "freed": (
        lambda c: c.broadcast(freed(c.empty(4))),
        errors.AllocationNotFound,
        "freed",
    ),
    "freed and sent": (
        lambda c: c.send(freed(c.empty(4))[0], c.empty(4)[1]),
        errors.AllocationNotFound,
        "freed",
    ),
    "result half over the input": (
        lambda c: c.all_reduce(arrays := c.empty(4), views(arrays, 1, 4)),
        errors.BufferOverlap,
        "rank 0: .* as all_reduce in place has them",
    ),
    "result over another block": (
        lambda c: c.reduce_scatter(arrays := c.empty(8), views(arrays, 0, 2)),
        errors.BufferOverlap,
        "rank 1: .* as reduce_scatter in place has them",
    ),
    "all_to_all shifted": (
        lambda c: c.all_to_all(views(arrays := c.empty(5), 1, 4), views(arrays, 0, 4)),
        errors.BufferOverlap,
        "rank 0: .* as all_to_all in place has them",
    ),
    "destination over a source": (
        lambda c: c.send_recv([((arrays := c.empty(4))[0], arrays[1]), (arrays[1], arrays[2])]),
        errors.BufferOverlap,
        "rank 1: .* one of them is a receive buffer",
    ),
}

WRONG_OPTIONS: dict[str, Wrong] = {
    **{
        f"unknown algorithm of {collective}": (
            lambda c, collective=collective: calls(c)[collective](algorithm="star"),
            errors.InvalidValue,
            f"unknown algorithm 'star' of {collective}; known: {', '.join(algorithms_of(collective))}",
        )
        for collective in COLLECTIVES
    },
    **{
        f"op of {collective}": (
            lambda c, collective=collective: calls(c)[collective](op="xor"),
            errors.InvalidValue,
            "unknown op 'xor'; known: sum, prod, min, max, avg",
        )
        for collective in ("all_reduce", "reduce", "reduce_scatter")
    },
    **{
        f"root {root} of {collective}": (
            lambda c, collective=collective, root=root: calls(c)[collective](root=root),
            errors.InvalidValue,
            f"root {root} is not one of 4 ranks",
        )
        for collective in ("reduce", "broadcast", "gather", "scatter")
        for root in (-1, 4)
    },
    **{
        f"{len(weights)} weights of {collective}": (
            lambda c, collective=collective, weights=weights: calls(c)[collective](weights=weights),
            errors.RankMismatch,
            f"4 ranks need one weight each, got {len(weights)}",
        )
        for collective in ("all_reduce", "reduce", "reduce_scatter")
        for weights in ([], [1.0] * 5)
    },
    "weights of a maximum": (
        lambda c: c.all_reduce(c.empty(4), op="max", weights=[1, 1, 1, 1]),
        errors.InvalidValue,
        "weights go with a reduction by SUM",
    ),
    "half as a weight of integers": (
        lambda c: c.all_reduce(c.empty(4, np.int32), weights=[1, 1, 0.5, 1]),
        errors.InvalidValue,
        "whole number",
    ),
    "schedule of another collective": (
        lambda c: c.reduce(c.empty(4), algorithm=line_broadcast()),
        errors.InvalidValue,
        "the schedule is for broadcast on 4 ranks with root 0, the call is reduce on 4 ranks with root 0",
    ),
    "schedule of another root": (
        lambda c: c.broadcast(c.empty(4), root=2, algorithm=line_broadcast(1)),
        errors.InvalidValue,
        "with root 1, .* with root 2",
    ),
    "schedule of other ranks": (
        lambda c: c.barrier(algorithm=find_algorithm("barrier", "dissemination").schedule(5)),
        errors.InvalidValue,
        "on 5 ranks .* on 4 ranks",
    ),
    "schedule of other pairs": (
        lambda c: c.send_recv(
            [(c.devices[0].empty(4), c.devices[1].empty(4))],
            algorithm=Schedule("send_recv", "other", NRANKS, 1, ((Transfer(2, 1, 0),),), pairs=((2, 1),)),
        ),
        errors.ScheduleNotProved,
        "rank 2 does not hold chunk 0",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS | WRONG_OPTIONS)
def test_what_does_not_fit_is_refused(comm: Communicator, wrong: str) -> None:
    call, error, message = (WRONG_ARRAYS | WRONG_OPTIONS)[wrong]
    with pytest.raises(error, match=message):
        call(comm)
    # Nothing was issued, and everything works on.
    assert comm.status() == ("IN_PROGRESS", "")
    assert comm.barrier() is not None


def test_arrays_of_other_devices_are_refused(client: Client, comm: Communicator) -> None:
    with client.communicator(2) as others, others.devices[0].empty(4) as theirs, comm.devices[0].empty(4) as ours:
        with pytest.raises(errors.RankMismatch, match=r"is on no device of Communicator\(\d+, 4 ranks"):
            comm.send(ours, theirs)
        with pytest.raises(errors.RankMismatch, match=r"its array is on device \d+"):
            comm.broadcast([theirs, *comm.empty(4)[1:]])


@pytest.mark.parametrize("collective", [*COLLECTIVES])
def test_a_closed_communicator_takes_no_more(client: Client, collective: str) -> None:
    comm = client.communicator(NRANKS)
    call = calls(comm)[collective]
    comm.close()
    with pytest.raises(errors.CommNotReady, match="closed"):
        call()


def test_a_refusal_within_a_group_leaves_the_others(comm: Communicator) -> None:
    arrays = comm.array(values(4))
    with comm.group() as group:
        comm.all_reduce(arrays)
        with pytest.raises(errors.InvalidValue, match="star"):
            comm.all_gather(arrays, algorithm="star")
        comm.barrier()
    assert group.result is not None
    assert [one.collective for one in group.result.operations] == ["all_reduce", "barrier"]
    for array in arrays:
        np.testing.assert_array_equal(array.get(), np.sum(values(4), axis=0))


def test_a_deadline_that_passes_is_a_timeout(client: Client, comm: Communicator) -> None:
    """A copy that does not end keeps one device, and the collective with it."""
    arrays = comm.array(values(4))
    with rpc_to(client.target) as rpc:
        copy = SlowCopy(rpc.coordinator, comm.devices[2].metadata, 8)
        try:
            for call in (lambda: comm.all_reduce(arrays, timeout_s=0.1), lambda: comm.barrier(timeout_s=0.1)):
                with pytest.raises(errors.OperationTimeout):
                    call()
        finally:
            copy.finish()
    comm.barrier()


def test_a_device_that_is_gone_is_named() -> None:
    with Fleet(2, ["--memory", "4MiB"]) as fleet, dsml_gpu.connect(fleet.address) as client:
        comm = client.communicator(2, on_failure="fail")
        arrays = comm.array([np.ones(4)] * 2)
        fleet.devices[1].process.kill()
        fleet.devices[1].process.wait()
        with pytest.raises(errors.PeerUnavailable, match="device 2"):
            comm.broadcast(arrays)
        with pytest.raises(errors.PeerUnavailable, match="device 2"):
            comm.barrier()
        status, message = comm.status()
        assert status == "FAILED"
        assert "barrier" in message
