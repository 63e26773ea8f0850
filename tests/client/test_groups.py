"""Groups of the client, which are sent as one message: what is refused where, and what runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dsml_gpu import Client, Communicator, errors
from dsml_gpu.client.groups import is_surely_valid
from dsml_gpu.client.rpc import CoordinatorConnection
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.client.collectives import NRANKS, line_broadcast
from tests.support.rpc import assert_refused, rpc_to


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls that go to the coordinator."""
    calls: list[tuple[str, Any]] = []
    original = CoordinatorConnection.call

    def call(self: CoordinatorConnection, method: str, request: Any, timeout_s: float | None = None) -> Any:
        calls.append((method, request))
        return original(self, method, request, timeout_s)

    monkeypatch.setattr(CoordinatorConnection, "call", call)
    return calls


def test_a_group_is_one_message(comm: Communicator, sent: list[tuple[str, Any]]) -> None:
    arrays, out = comm.array([np.full(8, 1.0)] * NRANKS), comm.empty(8)
    sent.clear()
    with comm.group() as group:
        comm.all_reduce(arrays, algorithm="ring")
        comm.all_to_all(arrays, out)
        comm.send_recv([(out[0], arrays[1]), (out[1], arrays[0])])
        comm.barrier()
        assert sent == []
    assert [method for method, _ in sent] == ["GroupEnd"]
    assert group.result is not None
    assert len(group.result.operations) == 4
    np.testing.assert_array_equal(arrays[1].get(), [NRANKS] * 8)


def test_what_the_client_cannot_judge_is_refused_where_it_stands(comm: Communicator) -> None:
    arrays = comm.array([np.full(8, 1.0)] * NRANKS)
    with comm.group() as group:
        comm.all_reduce(arrays)
        with pytest.raises(errors.InvalidValue, match="unknown algorithm 'star'"):
            comm.all_reduce(arrays, algorithm="star")
        with pytest.raises(errors.InvalidValue, match="weights go with a reduction by SUM"):
            comm.all_reduce(arrays, op="max", weights=[1.0] * NRANKS)
        with pytest.raises(errors.BufferOverlap, match="overlap, and one of them is a receive buffer"):
            comm.send_recv([(arrays[0], arrays[1]), (arrays[2], arrays[1])])
        comm.all_reduce(arrays, weights=[2.0] * NRANKS)
        comm.broadcast(arrays, root=1, algorithm=line_broadcast(1))
    assert group.result is not None
    assert [one.collective for one in group.result.operations] == ["all_reduce", "all_reduce", "broadcast"]
    np.testing.assert_array_equal(arrays[0].get(), [2.0 * NRANKS**2] * 8)


def test_an_empty_group_asks_nobody(comm: Communicator, sent: list[tuple[str, Any]]) -> None:
    with comm.group() as group:
        pass
    assert group.result is not None
    assert (group.result.operations, group.result.bytes_sent) == ((), 0)
    with comm.group(blocking=False) as later:
        pass
    assert later.result is None
    assert sent == []


def request(algorithm: str = "", **fields: Any) -> pb.CollectiveRequest:
    return pb.CollectiveRequest(kind=pb.CollectiveRequest.ALL_REDUCE, algorithm=algorithm, **fields)


def test_only_what_is_clear_is_surely_valid() -> None:
    assert is_surely_valid(request())
    assert is_surely_valid(request("auto"))
    assert is_surely_valid(request("ring"))
    assert not is_surely_valid(request("bruck_of_somebody"))
    assert not is_surely_valid(request(weights=[1.0]))
    assert not is_surely_valid(request(schedule=pb.Schedule()))
    ends = {"src": 0, "dst": 1, "count": 8, "sendAddr": 256, "recvAddr": 512}
    pairs = [pb.SendRecv(**ends), pb.SendRecv(**{**ends, "sendAddr": 1024})]
    kind = pb.CollectiveRequest.SEND_RECV
    assert is_surely_valid(pb.CollectiveRequest(kind=kind, sendRecvs=pairs[:1]))
    assert not is_surely_valid(pb.CollectiveRequest(kind=kind, sendRecvs=pairs))


def test_a_group_of_which_one_call_is_refused_runs_none(client: Client, comm: Communicator) -> None:
    arrays = comm.array([np.full(1, 1.0)] * NRANKS)
    buffers = [pb.RankBuffers(sendAddr=array.addr, recvAddr=array.addr) for array in arrays]
    right = request(counts=[8], buffers=buffers)
    with rpc_to(client.target) as rpc:

        def end(*operations: pb.CollectiveRequest) -> Any:
            return rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm.comm_id, operations=operations), timeout=15)

        assert_refused(lambda: end(right, request("star", counts=[8], buffers=buffers)), "INVALID_ARGUMENT", "INVALID_VALUE")
        assert arrays[0].get() == 1
        assert len(end(right, right).result.operations) == 2
        assert arrays[0].get() == NRANKS**2
        rpc.coordinator.GroupStart(pb.GroupStartRequest(commId=comm.comm_id), timeout=15)
        assert_refused(lambda: end(right), "FAILED_PRECONDITION", "GROUP_MISUSE")
        rpc.coordinator.GroupEnd(pb.GroupEndRequest(commId=comm.comm_id, discard=True), timeout=15)


def test_a_call_that_is_only_checked_neither_runs_nor_is_queued(client: Client, comm: Communicator) -> None:
    arrays = comm.array([np.full(1, 1.0)] * NRANKS)
    buffers = [pb.RankBuffers(sendAddr=array.addr, recvAddr=array.addr) for array in arrays]
    right = request(commId=comm.comm_id, counts=[8], buffers=buffers, checkOnly=True)
    with rpc_to(client.target) as rpc:
        assert not rpc.coordinator.Collective(right, timeout=15).HasField("result")
        out_of_range = request(
            commId=comm.comm_id,
            counts=[8],
            buffers=[pb.RankBuffers(sendAddr=1 << 40, recvAddr=1 << 40)] * NRANKS,
            checkOnly=True,
        )
        assert_refused(lambda: rpc.coordinator.Collective(out_of_range, timeout=15), "OUT_OF_RANGE", "ADDRESS_OUT_OF_RANGE")
    assert arrays[0].get() == 1
