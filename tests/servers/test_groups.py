"""Groups: what is queued runs at the end, in order, as one; it can be dropped, and its end need not be waited for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import numpy as np
import pytest

from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.schedules import algorithms_of
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.collectives.reference import carry_out
from tests.support.processes import wait_until
from tests.support.rpc import CALL_TIMEOUT_S, MIB, Rpc, all_reduce_on, assert_refused, naive, ring, rpc_to
from tests.support.slow_copy import SlowCopy

NRANKS = 3


@pytest.fixture(scope="module", params=["embedded", "fleet"])
def server(request: pytest.FixtureRequest) -> Iterator[Rpc]:
    if request.param == "embedded":
        with ServerProcess("coordinator", "--memory", "64MiB") as alone, rpc_to(alone.address) as rpc:
            yield rpc
    else:
        with Fleet(NRANKS, ["--memory", "64MiB"]) as fleet, rpc_to(fleet.address) as rpc:
            yield rpc


@pytest.fixture
def comm(server: Rpc) -> Iterator[pb.CommInitResponse]:
    with server.comm(NRANKS) as comm:
        yield comm


class Group:
    """The group RPCs of one communicator."""

    def __init__(self, rpc: Rpc, comm: pb.CommInitResponse) -> None:
        self._rpc = rpc
        self._comm_id = comm.commId

    def start(self) -> None:
        request = pb.GroupStartRequest(commId=self._comm_id)
        assert self._rpc.coordinator.GroupStart(request, timeout=CALL_TIMEOUT_S).success

    def end(self, **fields: Any) -> pb.GroupEndResponse:
        request = pb.GroupEndRequest(commId=self._comm_id, **fields)
        response: pb.GroupEndResponse = self._rpc.coordinator.GroupEnd(request, timeout=60)
        assert response.success
        return response


@pytest.fixture
def group(server: Rpc, comm: pb.CommInitResponse) -> Group:
    return Group(server, comm)


def write_all(rpc: Rpc, comm: pb.CommInitResponse, values: list[Any], offset: int = 0) -> None:
    for device, value in zip(comm.devices, values, strict=True):
        rpc.write(device.deviceId.value, offset, np.asarray(value, "<f8").tobytes())


def assert_all(rpc: Rpc, comm: pb.CommInitResponse, values: list[Any], offset: int = 0) -> None:
    for device, value in zip(comm.devices, values, strict=True):
        expected = np.asarray(value, "<f8")
        got = np.frombuffer(rpc.read(device.deviceId.value, offset, expected.nbytes), "<f8")
        np.testing.assert_array_equal(got, expected)


def test_nothing_runs_before_the_end(server: Rpc, comm: pb.CommInitResponse, group: Group):
    values = [[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]
    write_all(server, comm, values)
    group.start()
    queued = server.coordinator.AllReduceRing(ring(comm, 16), timeout=CALL_TIMEOUT_S)
    assert queued.success
    assert not queued.HasField("result")
    assert_all(server, comm, values)
    assert server.status(comm.commId).status == pb.IN_PROGRESS
    result = group.end().result
    assert_all(server, comm, [[6.0, 60.0]] * NRANKS)
    assert server.status(comm.commId).status == pb.SUCCESS
    assert result.algorithm == "ring"
    # A ring moves 2 * (n - 1) buffers in all, whatever n is.
    assert result.bytesSent == 2 * (NRANKS - 1) * 16
    assert result.elapsedNs > 0


def test_several_operations_on_one_buffer_run_in_order(server: Rpc, comm: pb.CommInitResponse, group: Group):
    """Sum, then product, then maximum with another buffer's part: any other order gives other numbers."""
    elements = 50_000
    write_all(server, comm, [np.full(elements, rank + 1.0) for rank in range(NRANKS)])
    group.start()
    server.coordinator.AllReduceRing(ring(comm, elements * 8), timeout=CALL_TIMEOUT_S)  # 6
    server.coordinator.NaiveAllReduce(naive(comm, elements * 8, op=pb.PROD), timeout=CALL_TIMEOUT_S)  # 216
    server.coordinator.AllReduceRing(ring(comm, elements * 8, op=pb.AVG), timeout=CALL_TIMEOUT_S)  # 216
    server.coordinator.AllReduceRing(ring(comm, elements * 4), timeout=CALL_TIMEOUT_S)  # first half: 648
    result = group.end().result
    expected = np.concatenate([np.full(elements // 2, 648.0), np.full(elements // 2, 216.0)])
    assert_all(server, comm, [expected] * NRANKS)
    assert result.algorithm == ""  # of several


def test_buffers_that_overlap_are_used_in_order(server: Rpc, comm: pb.CommInitResponse, group: Group):
    write_all(server, comm, [[1.0, 1.0, 1.0]] * NRANKS)
    group.start()
    server.coordinator.AllReduceRing(ring(comm, 16), timeout=CALL_TIMEOUT_S)
    server.coordinator.AllReduceRing(ring(comm, 16, offset=8), timeout=CALL_TIMEOUT_S)
    group.end()
    assert_all(server, comm, [[3.0, 9.0, 3.0]] * NRANKS)


def test_operations_of_several_types_in_one_group(server: Rpc, comm: pb.CommInitResponse, group: Group):
    write_all(server, comm, [[1.0]] * NRANKS)
    for device in comm.devices:
        server.write(device.deviceId.value, 64, np.array([100], "i1").tobytes())
    group.start()
    server.coordinator.AllReduceRing(ring(comm, 8), timeout=CALL_TIMEOUT_S)
    server.coordinator.NaiveAllReduce(naive(comm, 1, 64, dtype=pb.INT8), timeout=CALL_TIMEOUT_S)
    group.end()
    assert_all(server, comm, [[3.0]] * NRANKS)
    for device in comm.devices:
        assert np.frombuffer(server.read(device.deviceId.value, 64, 1), "i1") == 300 - 256  # wraps


# ---- all collectives -------------------------------------------------------------------------------------------------

BLOCK = 4 * 1003
#: Two buffers of a block for each rank, at addresses that are no multiples of 8.
A, B = 12, 12 + NRANKS * BLOCK
MEMORY = B + NRANKS * BLOCK


def collective(kind: str, send: int, recv: int, own: str = "", **fields: Any) -> pb.CollectiveRequest:
    """A collective of int32 on buffers that are at the same places on all ranks.

    Args:
        own: ``"send"`` or ``"recv"``: that address is of the rank's own block in the buffer.
    """
    request = pb.CollectiveRequest(kind=kind, dtype=pb.INT32, counts=[BLOCK], **fields)
    for rank in range(NRANKS):
        at = rank * BLOCK
        request.buffers.add(sendAddr=send + at * (own == "send"), recvAddr=recv + at * (own == "recv"))
    return request


def images(seed: int) -> list[np.ndarray]:
    """Memory of all ranks, full of small whole numbers."""
    generator = np.random.default_rng(seed)
    return [generator.integers(-7, 8, MEMORY // 4, np.int32).view(np.uint8) for _ in range(NRANKS)]


def after(requests: Sequence[pb.CollectiveRequest], before: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Memory of all ranks when the collectives have run one after the other."""
    memories = [memory.copy() for memory in before]
    for request in requests:
        carry_out(request, memories)
    return memories


def run_group(
    rpc: Rpc, comm: pb.CommInitResponse, group: Group, requests: Sequence[pb.CollectiveRequest], before: list[np.ndarray]
) -> pb.CollectiveResult:
    """Runs the collectives as one group, and compares all of memory."""
    for device, memory in zip(comm.devices, before, strict=True):
        rpc.write(device.deviceId.value, 0, memory.tobytes())
    group.start()
    for request in requests:
        request.commId = comm.commId
        assert not rpc.coordinator.Collective(request, timeout=CALL_TIMEOUT_S).HasField("result")
    result = group.end().result
    for rank, (device, expected) in enumerate(zip(comm.devices, after(requests, before), strict=True)):
        actual = np.frombuffer(rpc.read(device.deviceId.value, 0, MEMORY), np.uint8)
        np.testing.assert_array_equal(actual.view(np.int32), expected.view(np.int32), err_msg=f"rank {rank}")
    return result


def test_a_group_of_all_collectives_on_two_buffers(server: Rpc, comm: pb.CommInitResponse, group: Group):
    """Each works on what the one before it has left, so that it would show if two changed places or overlapped in time."""
    pairs = [
        pb.SendRecv(src=src, dst=dst, count=2 * BLOCK, sendAddr=B, recvAddr=at)
        for src, dst, at in ((0, 1, A + BLOCK), (1, 2, A), (2, 0, A))
    ]
    requests = [
        collective("ALL_TO_ALL", B, B),
        collective("SCATTER", B, A, own="recv", root=1),
        collective("GATHER", A, B, own="send", root=2),
        collective("ALL_GATHER", B, B, own="send"),
        collective("REDUCE_SCATTER", B, A, own="recv"),
        collective("ALL_REDUCE", B, A, weights=[1, 2, 3]),
        collective("ALL_TO_ALL", A, B),
        collective("ALL_TO_ALL", B, A),
        collective("BROADCAST", B, B, root=2),
        collective("ALL_TO_ALL", A, B),
        collective("ALL_TO_ALL", A, A),
        collective("ALL_REDUCE", A, A, op=pb.MIN),
        collective("ALL_TO_ALL", A, A),
        collective("REDUCE_SCATTER", A, A, own="recv"),
        pb.CollectiveRequest(kind=pb.CollectiveRequest.SEND_RECV, dtype=pb.INT32, sendRecvs=pairs),
        collective("ALL_GATHER", A, B, own="send"),
        collective("REDUCE", B, B, root=1),
        collective("REDUCE_SCATTER", A, B, own="recv", op=pb.MAX),
    ]
    before = images(0)
    right = after(requests, before)
    for number in range(len(requests) - 1):
        swapped = [*requests[:number], requests[number + 1], requests[number], *requests[number + 2 :]]
        assert not all(map(np.array_equal, after(swapped, before), right)), f"{number} and its next may change places"
    barrier = pb.CollectiveRequest(kind=pb.CollectiveRequest.BARRIER)
    requests.insert(9, barrier)
    result = run_group(server, comm, group, requests, before)
    assert {request.kind for request in requests} == {*pb.CollectiveRequest.Kind.values()} - {0}
    assert [operation.kind for operation in result.operations] == [request.kind for request in requests]


@pytest.mark.parametrize("seed", range(4))
def test_groups_of_any_collectives_by_any_algorithms(server: Rpc, comm: pb.CommInitResponse, group: Group, seed: int):
    random = Random(seed)
    owns = {"REDUCE_SCATTER": "recv", "SCATTER": "recv", "ALL_GATHER": "send", "GATHER": "send"}
    requests = []
    for _ in range(25):
        kind = random.choice([name for name, number in pb.CollectiveRequest.Kind.items() if number])
        request = pb.CollectiveRequest(kind=kind)
        if kind == "SEND_RECV":
            ranks = random.sample(range(NRANKS), NRANKS)
            for src, dst in enumerate(ranks):
                request.sendRecvs.add(src=src, dst=dst, count=2 * BLOCK, sendAddr=A + BLOCK, recvAddr=B)
        elif kind != "BARRIER":
            request = collective(kind, random.choice([A, B]), random.choice([A, B]), own=owns.get(kind, ""))
            request.op = random.choice([pb.SUM, pb.MIN, pb.MAX])
        if kind in ("REDUCE", "BROADCAST", "GATHER", "SCATTER"):
            request.root = random.randrange(NRANKS)
        request.algorithm = random.choice(["auto", *algorithms_of(kind.lower())])
        requests.append(request)
    result = run_group(server, comm, group, requests, images(seed))
    for request, operation in zip(requests, result.operations, strict=True):
        assert operation.kind == request.kind
        if request.algorithm != "auto":
            assert (operation.algorithm, operation.reason) == (request.algorithm, "as asked")


def test_the_next_operation_does_not_overwrite_what_is_still_being_read(
    server: Rpc, comm: pb.CommInitResponse, group: Group
):
    """Rank 1 is kept busy by rank 2 while rank 0 has data for it, and the next operation writes to where that is."""
    large, small = 24 * MIB, 4 * MIB
    write_all(server, comm, [np.full(small // 8, rank + 1.0) for rank in range(NRANKS)])
    group.start()
    for src, dst, count, recv in ((2, 1, large, 32 * MIB), (0, 1, small, 8 * MIB), (2, 0, small, 0)):
        request = pb.CollectiveRequest(commId=comm.commId, kind=pb.CollectiveRequest.SEND_RECV)
        request.sendRecvs.add(src=src, dst=dst, count=count, sendAddr=0, recvAddr=recv)
        server.coordinator.Collective(request, timeout=CALL_TIMEOUT_S)
    group.end()
    for rank, addr, value in ((1, 8 * MIB, 1.0), (0, 0, 3.0)):
        got = np.frombuffer(server.read(comm.devices[rank].deviceId.value, addr, small), "<f8")
        np.testing.assert_array_equal(got, np.full(small // 8, value), err_msg=f"rank {rank}")


# ---- the end of groups -----------------------------------------------------------------------------------------------


def test_an_empty_group_ends_and_is_no_collective(server: Rpc, comm: pb.CommInitResponse, group: Group):
    group.start()
    assert group.end().result.bytesSent == 0
    assert server.status(comm.commId).status == pb.IN_PROGRESS


def test_a_discarded_group_leaves_no_trace(server: Rpc, comm: pb.CommInitResponse, group: Group):
    values = [[1.0], [2.0], [3.0]]
    write_all(server, comm, values)
    group.start()
    server.coordinator.AllReduceRing(ring(comm, 8), timeout=CALL_TIMEOUT_S)
    assert not group.end(discard=True).HasField("result")
    assert_all(server, comm, values)
    assert server.status(comm.commId).status == pb.IN_PROGRESS
    # The next group has nothing of it.
    group.start()
    assert group.end().result.bytesSent == 0
    assert_all(server, comm, values)
    all_reduce_on(server, comm)


def test_the_end_of_a_non_blocking_group_is_seen_in_the_status(server: Rpc, comm: pb.CommInitResponse, group: Group):
    elements = MIB
    write_all(server, comm, [np.full(elements, rank + 1.0) for rank in range(NRANKS)])
    group.start()
    for _ in range(3):
        server.coordinator.AllReduceRing(ring(comm, elements * 8), timeout=CALL_TIMEOUT_S)
    # A copy to one of the devices is ahead of the group and keeps it from beginning.
    copy = SlowCopy(server.coordinator, comm.devices[0], 8)
    assert not group.end(nonBlocking=True).HasField("result")
    assert server.status(comm.commId).status == pb.IN_PROGRESS
    copy.finish()
    finalized = server.coordinator.CommFinalize(pb.CommFinalizeRequest(commId=comm.commId), timeout=60)
    assert finalized.status == pb.SUCCESS
    assert server.status(comm.commId).status == pb.SUCCESS
    for device in comm.devices:
        got = np.frombuffer(server.read(device.deviceId.value, 8, elements * 8 - 8), "<f8")
        np.testing.assert_array_equal(got, np.full(elements - 1, 6.0 * NRANKS**2))


def test_a_second_group_may_be_filled_while_the_first_one_runs(server: Rpc, comm: pb.CommInitResponse, group: Group):
    elements = MIB
    write_all(server, comm, [np.ones(elements)] * NRANKS)
    group.start()
    server.coordinator.AllReduceRing(ring(comm, elements * 8), timeout=CALL_TIMEOUT_S)
    group.end(nonBlocking=True)
    group.start()
    server.coordinator.NaiveAllReduce(naive(comm, elements * 8), timeout=CALL_TIMEOUT_S)
    group.end()
    assert_all(server, comm, [np.full(elements, 9.0)] * NRANKS)


def test_groups_of_two_communicators_are_apart(server: Rpc, comm: pb.CommInitResponse, group: Group):
    shared = [device.deviceId.value for device in comm.devices]
    with server.comm(NRANKS, deviceIds=shared) as other:
        write_all(server, comm, [[1.0]] * NRANKS)
        write_all(server, comm, [[5.0]] * NRANKS, offset=8)
        group.start()
        server.coordinator.AllReduceRing(ring(comm, 8), timeout=CALL_TIMEOUT_S)
        # The other one has no group, so its collectives run at once.
        assert server.coordinator.AllReduceRing(ring(other, 8, 8), timeout=CALL_TIMEOUT_S).HasField("result")
        assert_all(server, comm, [[1.0, 15.0]] * NRANKS)
        assert_refused(lambda: Group(server, other).end(), "FAILED_PRECONDITION", "GROUP_MISUSE", [other.commId])
        group.end()
        assert_all(server, comm, [[3.0, 15.0]] * NRANKS)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_group_that_fails_says_why_in_the_status(blocking: bool):
    with Fleet(2, ["--memory", "16MiB"], ["--on-failure", "fail"]) as fleet, rpc_to(fleet.address) as rpc:
        comm = rpc.comm_init(2)
        all_reduce_on(rpc, comm)
        group = Group(rpc, comm)
        group.start()
        rpc.coordinator.AllReduceRing(ring(comm, 800), timeout=CALL_TIMEOUT_S)
        rpc.coordinator.NaiveAllReduce(naive(comm, 80), timeout=CALL_TIMEOUT_S)
        fleet.devices[1].process.kill()
        fleet.devices[1].process.wait()
        if blocking:
            assert_refused(group.end, "UNAVAILABLE", "PEER_UNAVAILABLE", ["device 2", "2 operations"])
        else:
            group.end(nonBlocking=True)
        wait_until(lambda: rpc.status(comm.commId).status != pb.IN_PROGRESS, "the end of the group")
        status = rpc.status(comm.commId)
        assert status.status == pb.FAILED
        for word in ("device 2", fleet.devices[1].address, "2 operations"):
            assert word in status.message
        request = pb.CommFinalizeRequest(commId=comm.commId)
        assert rpc.coordinator.CommFinalize(request, timeout=CALL_TIMEOUT_S).status == pb.FAILED
