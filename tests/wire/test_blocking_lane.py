"""Lanes of blocking clients: answers and refusals, deadlines, many threads, and servers that end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.errors import CommNotFound, DeviceNotFound, InternalError, NoAnswer, PeerUnavailable, Unavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from dsml_gpu.wire.blocking_lane import BlockingLanes, LaneClosed
from dsml_gpu.wire.lane import LaneServer, can_have_lanes
from tests.support.faults import frozen

#: Nothing here takes so long.
LIMIT_S = 10.0
pytestmark = pytest.mark.skipif(not can_have_lanes(), reason="lanes need Linux's abstract sockets")


class Servicer:
    """GetCommStatus answers with the id that it is asked for; 0 waits until it is cancelled, 1 and 2 are refused."""

    def __init__(self) -> None:
        self.waits = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)

    async def GetCommStatus(self, request: pb.GetCommStatusRequest, context: Any) -> pb.GetCommStatusResponse:
        if request.commId == 1:
            raise DeviceNotFound("no device 1")
        if request.commId == 2:
            raise RuntimeError("a defect")
        if request.commId == 0:
            self.waits.release()
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                self.cancelled.release()
                raise
        return pb.GetCommStatusResponse(message=str(request.commId))


class Served:
    """A server in a thread."""

    def __init__(self) -> None:
        self.servicer = Servicer()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(LIMIT_S)

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = LaneServer(self.servicer, "GPUCoordinator")
        await server.start()
        self.name = server.name
        self._started.set()
        await self._end.wait()
        await server.stop()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join(LIMIT_S)


@pytest.fixture
def server() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def lanes(server: Served) -> Iterator[BlockingLanes]:
    lanes = BlockingLanes(server.name, "GPUCoordinator")
    yield lanes
    lanes.close()


def ask(lanes: BlockingLanes, number: int, timeout_s: float = LIMIT_S) -> str:
    return str(lanes.call("GetCommStatus", pb.GetCommStatusRequest(commId=number), timeout_s).message)


def test_calls_are_answered_over_one_connection(lanes: BlockingLanes) -> None:
    assert [ask(lanes, number) for number in range(3, 9)] == ["3", "4", "5", "6", "7", "8"]
    assert len(lanes._idle) == 1


def test_refusals_raise_their_classes_and_the_lane_goes_on(lanes: BlockingLanes) -> None:
    with pytest.raises(DeviceNotFound, match="no device 1"):
        ask(lanes, 1)
    with pytest.raises(InternalError, match="a defect"):
        ask(lanes, 2)
    assert ask(lanes, 3) == "3"
    assert len(lanes._idle) == 1


def test_a_call_that_is_not_answered_in_time_is_cancelled_at_the_server(server: Served, lanes: BlockingLanes) -> None:
    started = time.monotonic()
    with pytest.raises(NoAnswer):
        ask(lanes, 0, 0.2)
    assert time.monotonic() - started < LIMIT_S / 2
    assert server.servicer.cancelled.acquire(timeout=LIMIT_S)
    assert ask(lanes, 3) == "3"


def test_a_call_does_not_wait_for_that_of_another_thread(server: Served, lanes: BlockingLanes) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(ask, lanes, 0, 1.0) for _ in range(3)]
        for _ in waiting:
            assert server.servicer.waits.acquire(timeout=LIMIT_S)
        assert list(pool.map(lambda number: ask(lanes, number), range(10, 60))) == [str(n) for n in range(10, 60)]
        for call in waiting:
            with pytest.raises(NoAnswer):
                call.result(LIMIT_S)


def test_a_server_that_ends_breaks_the_call_under_way_and_closes_the_lane(server: Served, lanes: BlockingLanes) -> None:
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, lanes, 0)
        assert server.servicer.waits.acquire(timeout=LIMIT_S)
        server.stop()
        with pytest.raises((Unavailable, InternalError, dsml_gpu.errors.OperationAborted)):
            waiting.result(LIMIT_S)
    for _ in range(2):
        with pytest.raises(LaneClosed):
            ask(lanes, 3)


def test_an_idle_lane_whose_server_has_ended_is_closed_before_anything_is_sent(server: Served, lanes: BlockingLanes) -> None:
    assert ask(lanes, 3) == "3"
    server.stop()
    with pytest.raises(LaneClosed):
        ask(lanes, 4)


@pytest.mark.parametrize("name", ["", "dsml-nobody"])
def test_a_lane_that_is_not_there(name: str) -> None:
    with pytest.raises(LaneClosed):
        ask(BlockingLanes(name, "GPUCoordinator"), 3)


# ---- the client ------------------------------------------------------------------------------------------------------


def forbid_grpc(client: dsml_gpu.Client) -> Callable[[], None]:
    stub = client._connection._stub
    before = vars(stub).copy()

    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a call went over gRPC")

    for name in before:
        setattr(stub, name, refuse)
    return lambda: vars(stub).update(before)


def test_a_clients_calls_go_by_the_lane() -> None:
    with Fleet(2, ["--memory", "4MiB"]) as fleet, dsml_gpu.connect(fleet.address) as client:
        comm = client.communicator(2)
        forbid_grpc(client)
        arrays = comm.array([np.ones(4), np.ones(4)])
        with comm.group():
            comm.all_reduce(arrays)
        np.testing.assert_array_equal(arrays[1].get(), np.full(4, 2.0))
        with pytest.raises(CommNotFound):
            client._connection.call("GetCommStatus", pb.GetCommStatusRequest(commId=3))
        comm.close()


def test_a_coordinator_that_is_gone_is_named_and_one_that_freezes_ends_no_call_late() -> None:
    with Fleet(2, ["--memory", "4MiB"]) as fleet, dsml_gpu.connect(fleet.address) as client:
        comm = client.communicator(2)
        with frozen(fleet.coordinator), pytest.raises(NoAnswer):
            client._connection.call("GetCommStatus", pb.GetCommStatusRequest(commId=comm.comm_id), 0.3)
        assert comm.status()[0] == "IN_PROGRESS"
        fleet.coordinator.process.kill()
        fleet.coordinator.process.wait()
        with pytest.raises(PeerUnavailable, match=f"the coordinator at {fleet.address}"):
            comm.status()
