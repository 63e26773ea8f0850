"""Devices that die, and whose places others take with what a checkpoint has of their memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.client.arrays import DeviceArray
from dsml_gpu.client.communicator import Communicator
from dsml_gpu.errors import PeerUnavailable
from tests.support.faults import kill
from tests.support.processes import wait_until

NRANKS = 3
ELEMENTS = 60_000


@contextmanager
def fleet_of(
    ndevices: int, log: Path, *faults: str, transport: str = "grpc"
) -> Iterator[tuple[Fleet, dsml_gpu.Client, Communicator]]:
    """A fleet, and a communicator of its first three devices."""
    orders = [word for fault in faults for word in ("--failpoint", fault)]
    options = ["--memory", "64MiB", "--slice", "16KiB", *orders, "--failpoint-log", str(log)]
    with Fleet(ndevices, options, ["--transport", transport]) as fleet, dsml_gpu.connect(fleet.address) as client:
        yield fleet, client, client.communicator(NRANKS, on_failure="restore")


def contents() -> list[np.ndarray]:
    return [np.arange(ELEMENTS, dtype=np.int64) * 8 + (1 << (rank + 20)) for rank in range(NRANKS)]


def saved(comm: Communicator, folder: Path) -> list[DeviceArray]:
    """Arrays of all ranks that are in a checkpoint."""
    comm.empty(1000)  # so that addresses are not those of a device on which nothing was allocated
    arrays = comm.array(contents())
    comm.checkpoint(folder, {"x": arrays}).wait(30)
    return arrays


def assert_all(arrays: Sequence[DeviceArray], value: np.ndarray) -> None:
    for array in arrays:
        np.testing.assert_array_equal(array.get(), value)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize(
    ("place", "transport"),
    [("execute.begin", "grpc"), ("execute.slice", "grpc"), ("execute.done", "grpc"), ("execute.begin", "auto")],
)
def test_the_sum_has_what_all_ranks_had(tmp_path: Path, place: str, in_place: bool, transport: str) -> None:
    log = tmp_path / "faults"
    with fleet_of(NRANKS + 1, log, f"{place}:kill@device=1", transport=transport) as (_, client, comm):
        arrays = saved(comm, tmp_path / "checkpoint")
        out = arrays if in_place else comm.empty(ELEMENTS, np.int64)
        result = comm.all_reduce(arrays, None if in_place else out, timeout_s=30)
        assert log.read_text().startswith(place)
        assert result is not None
        assert (result.device_ids, result.epoch) == ((4, 2, 3), 2)
        (lost,) = result.lost
        assert (lost.device_id, lost.rank, lost.replaced_by) == (1, 0, 4)
        # The arrays of the one that is gone are those of the one that came, at the same addresses.
        assert [device.device_id for device in comm.devices] == [4, 2, 3]
        assert_all(out, np.sum(contents(), axis=0))
        arrays[0].set(np.zeros(ELEMENTS))
        comm.all_reduce(arrays, op="max")
        assert arrays[0].device.device_id == 4
        # Nothing else is put where they are.
        other = comm.empty(ELEMENTS, np.int64)
        assert abs(other[0].addr - arrays[0].addr) >= arrays[0].nbytes
        comm.close()
        with client.communicator(device_ids=[4]) as successor:
            successor.devices[0].empty(48 << 20, np.uint8)  # all that was allocated on it was freed


@pytest.mark.parametrize("way", ["group", "grow"])
def test_arrays_are_on_the_one_that_came_also_where_no_result_tells_of_it(tmp_path: Path, way: str) -> None:
    """In a group that nobody waits for, or when more devices come in."""
    with fleet_of(NRANKS + 2, tmp_path / "faults") as (fleet, _, comm):
        arrays = saved(comm, tmp_path / "checkpoint")
        kill(fleet.devices[1])
        if way == "group":
            with comm.group(blocking=False):
                comm.all_reduce(arrays, algorithm="ring")
            wait_until(lambda: comm.status()[0] == "SUCCESS", "the end of the group", 30)
            comm.all_reduce(arrays, op="max")
            assert_all(arrays, np.sum(contents(), axis=0))
        else:
            comm.grow(1)
            for rank, array in enumerate(arrays):
                np.testing.assert_array_equal(array.get(), contents()[rank])
        assert arrays[1].device is comm.devices[1]
        assert arrays[1].device.device_id in (4, 5)


def test_several_at_once_and_one_between_operations(tmp_path: Path) -> None:
    with fleet_of(NRANKS + 2, tmp_path / "faults") as (fleet, _, comm):
        arrays, out = saved(comm, tmp_path / "checkpoint"), comm.empty(ELEMENTS, np.int64)
        kill(fleet.devices[0])
        kill(fleet.devices[2])
        result = comm.all_reduce(arrays, out, timeout_s=30)
        assert result is not None
        assert {*result.device_ids} == {2, 4, 5}
        assert result.device_ids[1] == 2
        assert_all(out, np.sum(contents(), axis=0))


def test_the_one_that_was_to_take_the_place_dies_and_another_one_takes_it(tmp_path: Path) -> None:
    log = tmp_path / "faults"
    with fleet_of(NRANKS + 2, log, "shard.load:kill@device=4") as (fleet, _, comm):
        arrays, out = saved(comm, tmp_path / "checkpoint"), comm.empty(ELEMENTS, np.int64)
        kill(fleet.devices[1])
        result = comm.all_reduce(arrays, out, timeout_s=30)
        assert log.read_text().startswith("shard.load")
        assert result is not None
        assert result.device_ids == (1, 5, 3)
        assert_all(out, np.sum(contents(), axis=0))


@pytest.mark.parametrize(
    ("spares", "checkpointed", "message"),
    [
        (0, True, "no device is free that could take the place of device 2"),
        (1, False, "there is no checkpoint of what device 2"),
    ],
    ids=["no spare", "no checkpoint"],
)
def test_where_nothing_can_take_the_place_all_stays_as_it_was(
    tmp_path: Path, spares: int, checkpointed: bool, message: str
) -> None:
    with fleet_of(NRANKS + spares, tmp_path / "faults", "execute.slice:kill@device=2,skip=20") as (_, client, comm):
        arrays = saved(comm, tmp_path / "checkpoint") if checkpointed else comm.array(contents())
        for _ in range(2):
            with pytest.raises(PeerUnavailable, match=message):
                comm.all_reduce(arrays, algorithm="ring", timeout_s=30)
        for rank in (0, 2):
            np.testing.assert_array_equal(arrays[rank].get(), contents()[rank])
        comm.close()
        with client.communicator(2 + spares):
            pass


def test_a_checkpoint_that_has_not_what_is_read_is_not_enough(tmp_path: Path) -> None:
    with fleet_of(NRANKS + 1, tmp_path / "faults") as (fleet, client, comm):
        arrays = saved(comm, tmp_path / "checkpoint")
        others = comm.array(contents())
        kill(fleet.devices[1])
        with pytest.raises(
            PeerUnavailable, match=f"does not have all that is to be read of device 2 .* {others[1].addr:#x}"
        ):
            comm.all_reduce(others, timeout_s=30)
        np.testing.assert_array_equal(arrays[0].get(), contents()[0])
        comm.close()
        with client.communicator(3):
            pass
