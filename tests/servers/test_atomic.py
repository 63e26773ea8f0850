"""A collective over gRPC that fails leaves the buffers of all ranks that are left byte for byte as they were."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.client.arrays import DeviceArray
from dsml_gpu.client.communicator import Communicator
from dsml_gpu.errors import DsmlError, PeerUnavailable
from tests.support.processes import wait_until

NRANKS = 3
ELEMENTS = 60_000
#: Detection of a frozen device, and the slowness of a loaded machine.
LIMIT_S = 20.0


@contextmanager
def fleet_with(
    log: Path, *faults: str, options: Sequence[str] = ()
) -> Iterator[tuple[Fleet, dsml_gpu.Client, Communicator]]:
    """Three device servers with small slices, all of which have the same orders."""
    orders = [word for fault in faults for word in ("--failpoint", fault)]
    device_options = ["--memory", "64MiB", "--slice", "16KiB", *orders, "--failpoint-log", str(log)]
    with (
        Fleet(NRANKS, device_options, ["--transport", "grpc", "--on-failure", "fail", *options]) as fleet,
        dsml_gpu.connect(fleet.address) as client,
    ):
        yield fleet, client, client.communicator(NRANKS)


def buffers_of(comm: Communicator, seed: int) -> tuple[list[DeviceArray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    contents = [generator.integers(0, 1 << 40, ELEMENTS).astype(np.float64) for _ in range(NRANKS)]
    return comm.array(contents), contents


def assert_as_before(arrays: Sequence[DeviceArray], contents: Sequence[np.ndarray], but: int | None = None) -> None:
    for rank, (array, before) in enumerate(zip(arrays, contents, strict=True)):
        if rank != but:
            np.testing.assert_array_equal(array.get().view(np.uint64), before.view(np.uint64), err_msg=f"rank {rank}")


def assert_fired(log: Path, *places: str) -> None:
    fired = [line.split(":")[0] for line in log.read_text().splitlines()]
    assert fired == list(places), fired


# A ring on three ranks moves each of twelve slices of 160 KB per chunk and step: 60 and more come and go at each rank.
PHASES = ["execute.begin", "execute.slice", "execute.slice@skip=20", "execute.slice@skip=45", "execute.done"]


def order(phase: str, action: str, rank: int) -> str:
    place, _, conditions = phase.partition("@")
    return f"{place}:{action}@rank={rank}{',' + conditions if conditions else ''}"


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("rank", "in_place"), [(0, True), (2, False)], ids=["0 in place", "2 out of place"])
def test_a_rank_dies_in_each_phase(tmp_path: Path, rank: int, phase: str, in_place: bool) -> None:
    log = tmp_path / "faults"
    with fleet_with(log, order(phase, "kill", rank)) as (_, _, comm):
        sources, before = buffers_of(comm, 1)
        out, out_before = buffers_of(comm, 2)
        with pytest.raises(PeerUnavailable):
            comm.all_reduce(sources, None if in_place else out, algorithm="ring", timeout_s=LIMIT_S)
        assert_fired(log, phase.partition("@")[0])
        assert_as_before(sources, before, but=rank)
        assert_as_before(out, out_before, but=rank)


@pytest.mark.parametrize("algorithm", ["ring", "naive", "direct", "double_binary_tree", "halving_doubling"])
def test_a_defect_at_one_rank_leaves_all_as_they_were(tmp_path: Path, algorithm: str) -> None:
    """The rank with the defect as well, and the next collective does what it should."""
    log = tmp_path / "faults"
    with fleet_with(log, "execute.done:fail@rank=1") as (_, _, comm):
        arrays, before = buffers_of(comm, 3)
        with pytest.raises(DsmlError, match="failpoint"):
            comm.all_reduce(arrays, algorithm=algorithm, timeout_s=LIMIT_S)
        assert_fired(log, "execute.done")
        assert_as_before(arrays, before)
        comm.all_reduce(arrays, algorithm=algorithm, timeout_s=LIMIT_S)
        for array in arrays:
            np.testing.assert_array_equal(array.get(), sum(before))


def test_a_group_is_undone_as_a_whole(tmp_path: Path) -> None:
    """Operations one behind the other on the same arrays, and small ones that share a bucket."""
    log = tmp_path / "faults"
    with fleet_with(log, "execute.done:fail@rank=2") as (_, _, comm):
        arrays, before = buffers_of(comm, 4)
        out, out_before = buffers_of(comm, 5)
        small = [comm.array([np.full(100, 10.0 * number + rank) for rank in range(NRANKS)]) for number in range(5)]

        def run_group() -> None:
            with comm.group():
                for array in small:
                    comm.all_reduce(array, algorithm="ring")
                comm.all_reduce(arrays, algorithm="ring")
                comm.all_reduce(arrays, out, algorithm="naive")
                comm.broadcast(out, arrays[1], root=1)

        with pytest.raises(DsmlError, match="failpoint"):
            run_group()
        assert_fired(log, "execute.done")
        assert_as_before(arrays, before)
        assert_as_before(out, out_before)
        for number, array in enumerate(small):
            assert_as_before(array, [np.full(100, 10.0 * number + rank) for rank in range(NRANKS)])


@pytest.mark.parametrize(
    ("collective", "in_place"),
    [("all_gather", False), ("reduce_scatter", False), ("all_to_all", True), ("all_to_all", False), ("reduce", True)],
)
def test_other_collectives(tmp_path: Path, collective: str, in_place: bool) -> None:
    log = tmp_path / "faults"
    with fleet_with(log, "execute.done:fail@rank=0") as (_, _, comm):
        large, large_before = buffers_of(comm, 6)
        block = ELEMENTS // NRANKS
        small_before = [np.arange(block) + rank + 0.5 for rank in range(NRANKS)]
        small = comm.array(small_before)
        other, other_before = buffers_of(comm, 7)
        calls = {
            "all_gather": lambda: comm.all_gather(small, large, timeout_s=LIMIT_S),
            "reduce_scatter": lambda: comm.reduce_scatter(large, small, timeout_s=LIMIT_S),
            "all_to_all": lambda: comm.all_to_all(large, None if in_place else other, timeout_s=LIMIT_S),
            "reduce": lambda: comm.reduce(large, root=1, timeout_s=LIMIT_S),
        }
        with pytest.raises(DsmlError, match="failpoint"):
            calls[collective]()
        assert_fired(log, "execute.done")
        assert_as_before(large, large_before)
        assert_as_before(small, small_before)
        assert_as_before(other, other_before)


def test_a_frozen_rank_is_given_up_soon_and_the_others_are_as_before(tmp_path: Path) -> None:
    log = tmp_path / "faults"
    with fleet_with(log, "execute.slice:stop@rank=1,skip=30") as (fleet, client, comm):
        arrays, before = buffers_of(comm, 8)
        with pytest.raises(PeerUnavailable, match="no heartbeat"):
            comm.all_reduce(arrays, algorithm="ring", timeout_s=LIMIT_S)
        assert_fired(log, "execute.slice")
        assert_as_before(arrays, before, but=1)
        fleet.devices[1].process.send_signal(signal.SIGCONT)
        wait_until(lambda: any(device.device_id == 2 for device in client.devices()), "the device to be back")
        assert_as_before(arrays, before)  # it has undone its own part as well


def test_without_it_what_a_rank_had_is_lost(tmp_path: Path) -> None:
    """So the tests above see something."""
    log = tmp_path / "faults"
    with fleet_with(log, "execute.done:fail@rank=1", options=["--no-atomic"]) as (_, _, comm):
        arrays, before = buffers_of(comm, 9)
        with pytest.raises(DsmlError, match="failpoint"):
            comm.all_reduce(arrays, algorithm="ring", timeout_s=LIMIT_S)
        assert_fired(log, "execute.done")
        with pytest.raises(AssertionError):
            assert_as_before(arrays, before)
