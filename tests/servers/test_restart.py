"""Operations that go on without devices that die: undone, and run again on those that are left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.errors import CommNotReady, PeerUnavailable, RanksLost
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.faults import kill
from tests.support.processes import running
from tests.support.rpc import Rpc, ring, rpc_to

ELEMENTS = 60_000


@contextmanager
def fleet_of(
    nranks: int, log: Path | None = None, *faults: str, transport: str = "grpc"
) -> Iterator[tuple[Fleet, dsml_gpu.Client]]:
    orders = [word for fault in faults for word in ("--failpoint", fault)]
    if log is not None:
        orders += ["--failpoint-log", str(log)]
    with (
        Fleet(nranks, ["--memory", "64MiB", "--slice", "16KiB", *orders], ["--transport", transport]) as fleet,
        dsml_gpu.connect(fleet.address) as client,
    ):
        yield fleet, client


def contents(nranks: int) -> list[np.ndarray]:
    """Any subset of them has another sum."""
    return [np.arange(ELEMENTS, dtype=np.int64) * 8 + (1 << (rank + 20)) for rank in range(nranks)]


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize("phase", ["execute.begin@device=2", "execute.slice@device=2,skip=20", "execute.done@device=2"])
def test_who_is_left_has_the_sum_of_those_who_are_left(tmp_path: Path, phase: str, in_place: bool) -> None:
    place, _, condition = phase.partition("@")
    log = tmp_path / "faults"
    with fleet_of(4, log, f"{place}:kill@{condition}") as (_, client):
        comm = client.communicator(4)
        before = contents(4)
        arrays = comm.array(before)
        out = arrays if in_place else comm.empty(ELEMENTS, np.int64)
        result = comm.all_reduce(arrays, None if in_place else out, algorithm="ring", timeout_s=20)
        assert log.read_text().startswith(place)
        assert result is not None
        assert (result.device_ids, result.epoch) == ((1, 3, 4), 2)
        (lost,) = result.lost
        assert (lost.device_id, lost.rank) == (2, 1)
        assert lost.detection_s < 1
        for rank in (0, 2, 3):
            np.testing.assert_array_equal(out[rank].get(), before[0] + before[2] + before[3])
        # The communicator is one of three now, for those who know and for those who do not.
        assert (comm.nranks, comm.epoch, [device.device_id for device in comm.devices]) == (3, 2, [1, 3, 4])
        fresh = comm.array([np.full(5, rank) for rank in range(3)])
        comm.all_reduce(fresh)
        assert [array.get().tolist() for array in fresh] == [[3] * 5] * 3
        again = comm.all_reduce(arrays, op="max")
        assert again is not None
        assert (again.device_ids, again.lost) == ((1, 3, 4), ())


@pytest.mark.parametrize("transport", ["grpc", "auto"])
def test_one_after_the_other_dies_until_one_is_left(transport: str) -> None:
    with fleet_of(4, transport=transport) as (fleet, client):
        comm = client.communicator(4)
        before = contents(4)
        arrays, out = comm.array(before), comm.empty(ELEMENTS, np.int64)
        left = [0, 1, 2, 3]
        for dies in (2, 0, 3):
            left.remove(dies)
            kill(fleet.devices[dies])
            result = comm.all_reduce(arrays, out, timeout_s=20)
            assert result is not None
            assert result.device_ids == tuple(rank + 1 for rank in left)
            for rank in left:
                np.testing.assert_array_equal(out[rank].get(), sum(before[other] for other in left))
        kill(fleet.devices[1])
        with pytest.raises(PeerUnavailable, match="device 2 at"):
            comm.all_reduce(arrays, out, timeout_s=20)


def test_each_operation_of_a_group_says_on_whom_it_ran(tmp_path: Path) -> None:
    """Those before the loss are not run again: they are in place, and would count twice."""
    log = tmp_path / "faults"
    with fleet_of(3, log, "execute.begin:kill@device=1,skip=1", transport="auto") as (_, client):
        comm = client.communicator(3)
        arrays = comm.array([np.full(ELEMENTS, 10**rank, np.int64) for rank in range(3)])
        with comm.group() as group:
            comm.all_reduce(arrays, algorithm="ring")  # over gRPC, and so in another round than what follows
            comm.all_reduce(arrays, algorithm="direct")
        assert log.read_text()
        assert group.result is not None
        assert [operation.device_ids for operation in group.result.operations] == [(1, 2, 3), (2, 3)]
        assert (group.result.device_ids, group.result.epoch) == ((2, 3), 2)
        for rank in (1, 2):
            assert set(arrays[rank].get()) == {2 * 111}


def test_a_root_that_is_lost_fails_its_operation_and_no_other() -> None:
    with fleet_of(3) as (fleet, client):
        comm = client.communicator(3)
        arrays = comm.array([np.full(10, rank + 1) for rank in range(3)])
        kill(fleet.devices[0])
        with pytest.raises(RanksLost, match="root 0 is lost"):
            comm.broadcast(arrays, root=0, timeout_s=20)
        assert [arrays[rank].get().tolist() for rank in (1, 2)] == [[2] * 10, [3] * 10]
        comm.broadcast(arrays, root=2)
        assert arrays[1].get().tolist() == [3] * 10
        assert comm.nranks == 2
        comm.broadcast(arrays[1:], root=0)


def test_blocks_of_lost_ranks_stay_what_they_are() -> None:
    with fleet_of(3) as (fleet, client):
        comm = client.communicator(3)
        parts = comm.array([np.full(4, rank + 1) for rank in range(3)])
        whole = comm.array([np.full(12, -1)] * 3)
        kill(fleet.devices[1])
        comm.all_gather(parts, whole, timeout_s=20)
        assert whole[2].get().tolist() == [1] * 4 + [-1] * 4 + [3] * 4
        comm.reduce_scatter(whole, parts)
        assert [parts[rank].get().tolist() for rank in (0, 2)] == [[2] * 4, [6] * 4]


def test_one_that_is_not_to_go_on_fails_and_so_do_later_ones() -> None:
    with fleet_of(3) as (fleet, client):
        comm = client.communicator(3, on_failure="fail")
        before = contents(3)
        arrays = comm.array(before)
        kill(fleet.devices[1])
        for _ in range(2):
            with pytest.raises(PeerUnavailable, match="device 2 at"):
                comm.all_reduce(arrays, timeout_s=20)
        for rank in (0, 2):
            np.testing.assert_array_equal(arrays[rank].get(), before[rank])
        assert comm.status()[0] == "FAILED"


def test_a_client_of_the_original_contract_goes_on() -> None:
    with Fleet(3, ["--memory", "8MiB"]) as fleet, rpc_to(fleet.address) as rpc:
        comm = rpc.comm_init(3)
        write(rpc, comm)
        kill(fleet.devices[2])
        assert rpc.coordinator.AllReduceRing(ring(comm, 80), timeout=20).success
        assert [np.frombuffer(rpc.read(rank, 0, 80))[0] for rank in (1, 2)] == [3, 3]
        status = rpc.status(comm.commId)
        assert (status.status, status.epoch) == (pb.SUCCESS, 2)
        assert [device.deviceId.value for device in status.devices] == [1, 2]


def write(rpc: Rpc, comm: pb.CommInitResponse) -> None:
    for rank, device in enumerate(comm.devices):
        rpc.write(device.deviceId.value, 0, np.full(10, rank + 1.0).tobytes())


def test_a_frozen_device_is_left_behind_and_does_nothing_when_it_wakes_up() -> None:
    with fleet_of(3) as (fleet, client):
        comm = client.communicator(3)
        before = contents(3)
        arrays, out = comm.array(before), comm.empty(ELEMENTS, np.int64)
        fleet.devices[1].process.send_signal(signal.SIGSTOP)
        started = time.monotonic()
        result = comm.all_reduce(arrays, out, algorithm="ring", timeout_s=30)
        assert result is not None
        assert time.monotonic() - started < 10
        assert result.device_ids == (1, 3)
        fleet.devices[1].process.send_signal(signal.SIGCONT)
        # It is told what has become of the communicator before anybody can have it again.
        with waiting_for_device(client, 2):
            for rank in (0, 2):
                np.testing.assert_array_equal(out[rank].get(), before[0] + before[2])
            with client.communicator(device_ids=[2, 1]) as other:
                ones = other.array([np.ones(10)] * 2)
                other.all_reduce(ones)
                assert ones[0].get().tolist() == [2] * 10
        after = comm.all_reduce(arrays, out)
        assert after is not None
        assert after.device_ids == (1, 3)


@contextmanager
def waiting_for_device(client: dsml_gpu.Client, device_id: int) -> Iterator[None]:
    limit = time.monotonic() + 20
    while device_id not in [device.device_id for device in client.devices()]:
        assert time.monotonic() < limit, "it does not come back"
        threading.Event().wait(0.02)
    yield


def test_a_server_that_was_started_again_is_reached_by_its_peers_at_once(tmp_path: Path) -> None:
    """gRPC puts the next attempt to connect off, which is for nobody to wait for where somebody has just answered."""
    dies = ("--failpoint", "execute.begin:kill@device=2,skip=1")
    with running(tmp_path, "device", "--id", "1") as one, running(tmp_path, "device", "--id", "2", *dies) as two:
        options = ["--device", one.address, "--device", two.address, "--transport", "grpc", "--embedded", "0"]
        with (
            running(tmp_path, "coordinator", *options) as coordinator,
            dsml_gpu.connect(coordinator.address) as client,
        ):
            comm = client.communicator(2)
            arrays = comm.array([np.ones(ELEMENTS)] * 2)
            comm.all_reduce(arrays, algorithm="ring")
            comm.all_reduce(arrays, algorithm="ring")
            assert two.process.wait(20) == -signal.SIGKILL
            comm.close()
            with (
                running(tmp_path, "device", "--id", "2", "--port", two.address.rpartition(":")[2]),
                waiting_for_device(client, 2),
                client.communicator(2) as again,
            ):
                arrays = again.array([np.ones(ELEMENTS)] * 2)
                result = again.all_reduce(arrays, algorithm="ring")
                assert result is not None
                assert {*result.device_ids} == {1, 2}


def test_a_closed_communicator_stays_closed() -> None:
    with fleet_of(2) as (fleet, client):
        comm = client.communicator(2)
        arrays = comm.array([np.ones(4)] * 2)
        comm.finalize()
        kill(fleet.devices[1])
        with pytest.raises(CommNotReady):
            comm.all_reduce(arrays)
        comm.close()


def test_arrays_on_a_device_that_was_left_behind_are_not_what_it_has_now(tmp_path: Path) -> None:
    """Its server is started again, and another communicator takes it."""
    with running(tmp_path, "device", "--id", "1") as one, running(tmp_path, "device", "--id", "2") as two:
        options = ["--device", one.address, "--device", two.address, "--embedded", "0"]
        with running(tmp_path, "coordinator", *options) as coordinator, dsml_gpu.connect(coordinator.address) as client:
            comm = client.communicator(2)
            arrays = comm.array([np.ones(ELEMENTS)] * 2)
            two.process.kill()
            two.process.wait()
            result = comm.all_reduce(arrays)
            assert result is not None
            assert result.device_ids == (1,)
            with (
                running(tmp_path, "device", "--id", "2", "--port", two.address.rpartition(":")[2]),
                waiting_for_device(client, 2),
                client.communicator(device_ids=[2]) as other,
            ):
                (theirs,) = other.array([np.full(ELEMENTS, 7.0)])
                for use in (arrays[1].get, lambda: arrays[1].set(np.zeros(ELEMENTS))):
                    with pytest.raises(PeerUnavailable, match="device 2 was left behind"):
                        use()
                arrays[1].free()
                assert (theirs.get() == 7).all()
