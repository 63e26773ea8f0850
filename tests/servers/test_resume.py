"""Coordinators that are killed, or stopped, and the next ones, which go on with their communicators."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu import Client, Communicator, errors
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.coordinator_kills import LIMIT_S, devices, kills
from tests.support.coordinators import Coordinators
from tests.support.rpc import rpc_to

ELEMENTS = 60_000
SUM = sum(np.arange(ELEMENTS, dtype=np.int64) + 10**rank for rank in range(3))


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ServerProcess]]:
    with devices() as servers:
        yield servers


@pytest.fixture
def coordinators(tmp_path: Path, servers: list[ServerProcess]) -> Iterator[Coordinators]:
    one_after_the_other = Coordinators(tmp_path, servers, tmp_path / "state", "--transport", "grpc")
    yield one_after_the_other
    one_after_the_other.stop()


def connect(coordinators: Coordinators) -> Client:
    return dsml_gpu.connect(coordinators.address, timeout_s=LIMIT_S, reconnect_s=LIMIT_S)


def arrays_of(comm: Communicator) -> Any:
    return comm.array([np.arange(ELEMENTS, dtype=np.int64) + 10**rank for rank in range(comm.nranks)])


def assert_all(arrays: Any, value: Any) -> None:
    for array in arrays:
        np.testing.assert_array_equal(array.get(), value)


def killed(coordinators: Coordinators, fault: str, call: Callable[[], Any], next_fault: str = "") -> Any:
    """What a call gives whose coordinator has a fault that ends it, and is started again."""
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(call)
        coordinators.ends()
        assert coordinators.faults.splitlines()[-1].startswith(fault)
        coordinators.start(next_fault)
        return waits.result(LIMIT_S)


# ---- an operation under way ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "place"),
    [
        ("grpc", "round.begin"),
        ("grpc", "round.done"),
        ("grpc", "round.recorded"),
        ("grpc", "outcomes.done"),
        ("p2p", "round.begun"),
        ("p2p", "round.done"),
        ("p2p", "round.recorded"),
    ],
)
def test_a_sum_in_place_happens_once(coordinators: Coordinators, transport: str, place: str) -> None:
    method = "@method=Collective" if place.startswith("outcomes") else ""
    coordinators.start(f"{place}:kill{method}")
    with connect(coordinators) as client:
        comm = client.communicator(3, transport=transport)
        arrays = arrays_of(comm)
        result = killed(coordinators, place, lambda: comm.all_reduce(arrays, timeout_s=LIMIT_S))
        assert (result.device_ids, result.epoch, result.transports) == ((1, 2, 3), 1, (transport,))
        assert_all(arrays, SUM)
        comm.all_reduce(arrays)
        assert_all(arrays, 3 * SUM)
        assert comm.epoch == 1


def test_what_ranks_have_not_forgotten_yet_is_kept_when_others_have_recorded_more(coordinators: Coordinators) -> None:
    """Nothing tells the ranks that a small operation is over, until the next one of their communicator."""
    coordinators.start("round.begin:kill@skip=1")
    with connect(coordinators) as client:
        comm = client.communicator(3)
        arrays = arrays_of(comm)
        comm.all_reduce(arrays)
        killed(coordinators, "round.begin", lambda: comm.all_reduce(arrays, timeout_s=LIMIT_S))
        assert_all(arrays, 3 * SUM)


def test_a_group_is_not_begun_anew(tmp_path: Path, servers: list[ServerProcess]) -> None:
    """The first of its rounds is done when the coordinator dies, the second is undone."""
    coordinators = Coordinators(tmp_path, servers, tmp_path / "state")
    coordinators.start("round.done:kill@skip=1")
    with connect(coordinators) as client:
        comm = client.communicator(3)
        arrays = arrays_of(comm)

        def run() -> Any:
            with comm.group() as group:
                comm.all_reduce(arrays, algorithm="direct")  # by passes, and so in another round than what follows
                comm.all_reduce(arrays, algorithm="ring")
            return group.result

        result = killed(coordinators, "round.done", run)
        assert [operation.algorithm for operation in result.operations] == ["direct", "ring"]
        assert_all(arrays, 3 * SUM)
    coordinators.stop()


def test_it_is_killed_again_and_again(coordinators: Coordinators) -> None:
    coordinators.start("round.done:kill")
    with connect(coordinators) as client:
        comm = client.communicator(3)
        arrays = arrays_of(comm)
        with ThreadPoolExecutor(1) as pool:
            waits = pool.submit(lambda: comm.all_reduce(arrays, timeout_s=LIMIT_S))
            for fault in ("round.recorded:kill", ""):
                coordinators.ends()
                coordinators.start(fault)
            waits.result(LIMIT_S)
        assert coordinators.faults.split() == ["round.done:kill", "round.recorded:kill"]
        assert_all(arrays, SUM)


def test_without_a_key_what_is_not_recorded_is_undone(coordinators: Coordinators) -> None:
    coordinators.start("round.done:kill")
    with connect(coordinators) as client:
        comm = client.communicator(3)
        arrays = arrays_of(comm)
        request = pb.AllReduceRingRequest(commId=comm.comm_id, count=ELEMENTS * 8, dtype=pb.INT64)
        for rank, array in enumerate(arrays):
            request.memAddrs[rank].value = array.addr
        with rpc_to(coordinators.address) as rpc, pytest.raises(Exception, match=r"UNAVAILABLE"):
            rpc.coordinator.AllReduceRing(request, timeout=LIMIT_S)
        coordinators.ends()
        assert coordinators.faults == "round.done:kill \n"
        coordinators.start()
        for rank, array in enumerate(arrays):
            np.testing.assert_array_equal(array.get(), np.arange(ELEMENTS) + 10**rank)


@pytest.mark.parametrize("transport", ["grpc", "p2p"])
@pytest.mark.parametrize(("n", "seed"), [(5, 1), pytest.param(100, 2, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_killed_at_random(tmp_path: Path, servers: list[ServerProcess], transport: str, n: int, seed: int) -> None:
    assert len(list(kills(tmp_path, servers, n, seed, transport))) == n


@pytest.mark.parametrize("place", ["outcomes.done", "outcomes.kept"])
@pytest.mark.parametrize("method", ["Malloc", "Free"])
def test_memory_is_reserved_and_given_back_once(coordinators: Coordinators, method: str, place: str) -> None:
    """It would not fit twice."""
    coordinators.start(f"{place}:kill@method={method}")
    with connect(coordinators) as client:
        device = client.devices()[0]
        killed(coordinators, place, lambda: device.empty(40 << 20, np.uint8).free())
        device.empty(40 << 20, np.uint8).free()


# ---- what is still there ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_communicators_are_as_they_were(coordinators: Coordinators, tmp_path: Path, end: signal.Signals) -> None:
    coordinators.start()
    with connect(coordinators) as client:
        comm = client.communicator(2, on_failure="restore")
        other = client.communicator(device_ids=[3, 1], on_failure="fail")  # shares a device
        arrays, others = arrays_of(comm), arrays_of(other)
        comm.checkpoint(tmp_path / "checkpoint", {"x": arrays}).wait(LIMIT_S)
        comm.all_reduce(arrays)
        with pytest.raises(errors.InvalidValue):
            comm.all_reduce(arrays, algorithm="no such")
        assert coordinators.now.ends(end) == (0 if end == signal.SIGTERM else -signal.SIGKILL)
        found = coordinators.journal()
        assert {one.comm_id for one in found.communicators} == {comm.comm_id, other.comm_id}
        coordinators.start()
        with rpc_to(coordinators.address) as rpc:
            first, second = (
                rpc.coordinator.GetCommStatus(pb.GetCommStatusRequest(commId=one.comm_id)) for one in (comm, other)
            )
            listed = rpc.coordinator.ListDevices(pb.ListDevicesRequest()).devices
        assert (first.status, first.epoch) == (pb.SUCCESS, 1)
        assert [device.deviceId.value for device in second.devices] == [3, 1]
        assert second.status == pb.IN_PROGRESS  # nothing has run on it yet
        assert [sorted(one.commIds) for one in listed] == [
            sorted([comm.comm_id, other.comm_id]),
            [comm.comm_id],
            [other.comm_id],
        ]
        pair = sum(np.arange(ELEMENTS) + 10**rank for rank in range(2))
        assert_all(arrays, pair)
        comm.all_reduce(arrays, op="max")
        other.all_reduce(others)
        assert_all(others, pair)
        (known,) = [one for one in coordinators_journal(coordinators) if one.comm_id == comm.comm_id]
        assert known.checkpoint.endswith("checkpoint")
        assert known.checkpoint_seats == (0, 1)


def coordinators_journal(coordinators: Coordinators) -> Any:
    coordinators.kill()
    found = coordinators.journal().communicators
    coordinators.start()
    return found


def test_a_communicator_that_was_finalized_still_is(coordinators: Coordinators) -> None:
    coordinators.start()
    with connect(coordinators) as client:
        comm = client.communicator(2)
        arrays = arrays_of(comm)
        with rpc_to(coordinators.address) as rpc:
            rpc.coordinator.CommFinalize(pb.CommFinalizeRequest(commId=comm.comm_id))
        coordinators.kill()
        coordinators.start()
        with pytest.raises(errors.CommNotReady, match="finalized"):
            comm.all_reduce(arrays)
        comm.close()
        coordinators.kill()
        assert coordinators.journal().communicators == ()
        coordinators.start()


def test_epochs_go_on(tmp_path: Path) -> None:
    """Ranks are lost before, while, and after the coordinator is away; requests use the numbers of the first epoch."""
    with ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess("device", "--id", str(rank + 1))) for rank in range(4)]
        coordinators = Coordinators(tmp_path, servers, tmp_path / "state", "--transport", "grpc")
        stack.callback(coordinators.stop)
        coordinators.start()
        client = stack.enter_context(connect(coordinators))
        comm = client.communicator(4)
        arrays, out = comm.array([np.full(8, 10**rank) for rank in range(4)]), comm.empty(8, np.int64)

        def sums() -> tuple[Any, Any]:
            result = comm.all_reduce(arrays, out, timeout_s=LIMIT_S)
            return (result.epoch, result.device_ids), [array.get()[0] for array in out if array.device.device_id == 4]

        servers[0].kill()
        assert sums() == ((2, (2, 3, 4)), [1110])
        coordinators.kill()
        servers[1].kill()
        port = int(servers[1].address.rpartition(":")[2])
        stack.enter_context(ServerProcess("device", "--id", "2", port=port))  # it is another one now
        coordinators.start()
        assert sums() == ((3, (3, 4)), [1100])
        coordinators.kill()
        coordinators.start()
        in_first = pb.AllReduceRingRequest(commId=comm.comm_id, count=64, dtype=pb.INT64)
        for rank, addr in enumerate((1 << 60, 1 << 61, out[2].addr, out[3].addr)):  # nobody looks at those of lost ranks
            in_first.memAddrs[rank].value = addr
        with rpc_to(coordinators.address) as rpc:
            assert rpc.coordinator.AllReduceRing(in_first, timeout=LIMIT_S).result.deviceIds == [3, 4]
        coordinators.kill()
        servers[2].kill()
        coordinators.start()
        result = comm.all_reduce(arrays, out, timeout_s=LIMIT_S)
        (lost,) = result.lost
        assert (lost.device_id, lost.reason) == (
            3,
            f"device 3 at {servers[2].address} has not answered since the coordinator was started",
        )
        assert sums() == ((4, (4,)), [1000])


def test_a_place_is_taken_with_what_the_checkpoint_has(tmp_path: Path) -> None:
    """The coordinator that was killed is not the one that replaces the device."""
    with ExitStack() as stack:
        servers = [stack.enter_context(ServerProcess("device", "--id", str(rank + 1))) for rank in range(3)]
        coordinators = Coordinators(tmp_path, servers, tmp_path / "state", "--transport", "grpc")
        stack.callback(coordinators.stop)
        coordinators.start()
        client = stack.enter_context(connect(coordinators))
        comm = client.communicator(2, on_failure="restore")
        arrays = arrays_of(comm)
        comm.checkpoint(tmp_path / "checkpoint", {"x": arrays}).wait(LIMIT_S)
        coordinators.kill()
        servers[0].kill()
        coordinators.start()
        result = comm.all_reduce(arrays, timeout_s=LIMIT_S)
        assert (result.device_ids, result.epoch) == ((3, 2), 2)
        assert_all(arrays, sum(np.arange(ELEMENTS) + 10**rank for rank in range(2)))


def test_devices_that_have_registered_are_found(tmp_path: Path) -> None:
    coordinators = Coordinators(tmp_path, [], tmp_path / "state", "--transport", "grpc", "--embedded", "0")
    coordinators.start()
    with ExitStack() as stack:
        stack.callback(coordinators.stop)
        for number in (1, 2):
            stack.enter_context(ServerProcess("device", "--id", str(number), "--coordinator", coordinators.address))
        client = stack.enter_context(connect(coordinators))
        while len(client.devices()) < 2:
            pass
        comm = client.communicator(2)
        arrays = arrays_of(comm)
        coordinators.kill()
        coordinators.start()
        comm.all_reduce(arrays, timeout_s=LIMIT_S)
        assert_all(arrays, sum(np.arange(ELEMENTS) + 10**rank for rank in range(2)))


def test_embedded_devices_end_with_their_coordinator(tmp_path: Path) -> None:
    coordinators = Coordinators(tmp_path, [], tmp_path / "state")
    coordinators.start()
    with connect(coordinators) as client:
        comm = client.communicator(2)
        coordinators.kill()
        coordinators.start()
        with pytest.raises(errors.CommNotFound):
            comm.barrier()
        said = f"communicator {comm.comm_id} is over: its devices 1, 2 were in the process of the coordinator that has ended"
        assert said in coordinators.now.stderr
    coordinators.stop()
