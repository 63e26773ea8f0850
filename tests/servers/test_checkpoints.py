"""Checkpoints of real processes, which die, freeze and are restarted while they write them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsml_gpu
from dsml_gpu import Communicator, DeviceArray
from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.coordinator.checkpoints import SavedRange, restore_rank, saved_ranges
from dsml_gpu.errors import (
    AddressOutOfRange,
    CheckpointDamaged,
    CheckpointNotFound,
    InvalidValue,
    PeerUnavailable,
    StorageUnavailable,
)
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.in_this_process import coordinating, in_event_loop
from tests.support.processes import wait_until
from tests.support.rpc import CALL_TIMEOUT_S, MIB, rpc_to

NRANKS = 3
WAIT_S = 60.0
#: A device or coordinator that is gone is known by then, also on a loaded machine.
SOON_S = 20.0


@contextmanager
def communicator(address: str, nranks: int = NRANKS) -> Iterator[Communicator]:
    # Without reconnection: what these tests end does not come back.
    with dsml_gpu.connect(address, reconnect_s=0) as client, client.communicator(nranks) as comm:
        yield comm


def values(number: int, rank: int) -> np.ndarray:
    return np.arange(300_000 + rank, dtype=np.int32) + 1_000_000 * number + 7 * rank


def fill(arrays: list[DeviceArray], number: int) -> None:
    for rank, array in enumerate(arrays):
        array.set(values(number, rank))


def arrays_on(comm: Communicator, number: int) -> list[DeviceArray]:
    return comm.array([values(number, rank) for rank in range(comm.nranks)])


def assert_holds(address: str, folder: Path, *numbers: int) -> int:
    """Asserts that the checkpoint of a folder is one of these; returns which."""
    with communicator(address) as comm:
        found = [array.get() for array in comm.restore(folder)["a"]]
    for number in numbers:
        if all(np.array_equal(array, values(number, rank)) for rank, array in enumerate(found)):
            return number
    raise AssertionError(f"the checkpoint is none of {numbers}")


def test_from_processes_to_fewer_processes(tmp_path: Path):
    with Fleet(NRANKS) as fleet, communicator(fleet.address) as comm:
        arrays = arrays_on(comm, 1)
        job = comm.checkpoint(tmp_path / "new" / "folder", {"a": arrays})
        comm.barrier()
        fill(arrays, 2)
        job.wait(WAIT_S)
        assert job.progress == (sum(array.nbytes for array in arrays), sum(array.nbytes for array in arrays))
    for rank, file in enumerate(sorted((tmp_path / "new" / "folder").glob("*.safetensors"))):
        np.testing.assert_array_equal(load_file(file)["a"], values(1, rank))
    with Fleet(2) as fleet, communicator(fleet.address, 2) as comm:
        whole = np.concatenate([values(1, rank) for rank in range(NRANKS)])
        for array, part in zip(comm.restore(tmp_path / "new" / "folder")["a"], np.array_split(whole, 2), strict=True):
            np.testing.assert_array_equal(array.get(), part)


@pytest.mark.alone
def test_heartbeats_go_on_while_memory_is_copied_and_files_are_written(tmp_path: Path):
    nbytes = 384 * MIB
    with ServerProcess("device", "--memory", "512MiB") as server, rpc_to(server.address) as rpc:
        beats = rpc.device.Heartbeat(pb.HeartbeatRequest(intervalMs=50), timeout=WAIT_S)
        next(beats)
        times: list[float] = []

        def listen() -> None:
            with suppress(grpc.RpcError):  # cancelled
                for _ in beats:
                    times.append(time.monotonic())

        listener = threading.Thread(target=listen)
        listener.start()
        array = pb.ArrayRange(name="a", dtype="UINT8", shape=[nbytes], memAddr=0)
        url = f"{tmp_path}/a.safetensors"
        began = time.monotonic()
        *_, last = rpc.device.SaveShard(pb.SaveShardRequest(url=url, arrays=[array]), timeout=WAIT_S)
        part = pb.LoadedPart(url=url, json=last.json, name="a", numBytes=nbytes)
        request = pb.LoadShardRequest(arrays=[pb.LoadedArray(memAddr=0, parts=[part])])
        assert rpc.device.LoadShard(request, timeout=WAIT_S).numBytes == nbytes
        ended = time.monotonic()
        beats.cancel()
        listener.join()
    heard = [began, *(one for one in times if began <= one <= ended), ended]
    assert len(heard) >= 8, "too fast for this test: make it larger"
    # Devices are given up after 2 s.
    assert max(later - earlier for earlier, later in pairwise(heard)) < 1.5


@pytest.mark.parametrize("action", ["kill", "stop"])
def test_a_device_that_is_lost_while_it_writes(tmp_path: Path, action: str):
    log = tmp_path / "faults"
    fault = ("--failpoint", f"shard.begin:{action}@device=2,skip=1", "--failpoint-log", str(log))
    with Fleet(NRANKS, fault) as fleet:
        with communicator(fleet.address) as comm:
            arrays = arrays_on(comm, 1)
            comm.checkpoint(tmp_path / "c", {"a": arrays}).wait(WAIT_S)
            fill(arrays, 2)
            began = time.monotonic()
            with pytest.raises(PeerUnavailable, match="device 2"):
                comm.checkpoint(tmp_path / "c", {"a": arrays}).wait(WAIT_S)
            assert time.monotonic() - began < SOON_S
        assert log.read_text().startswith(f"shard.begin:{action}")
        fleet.devices[1].process.kill()
        with ServerProcess("device", "--id", "9") as spare:
            addresses = [
                option for one in (fleet.devices[0], spare, fleet.devices[2]) for option in ("--device", one.address)
            ]
            with ServerProcess("coordinator", *addresses) as coordinator:
                assert assert_holds(coordinator.address, tmp_path / "c", 1) == 1


@pytest.mark.parametrize(("place", "left"), [("checkpoint.manifest", 1), ("checkpoint.complete", 2)])
def test_a_coordinator_that_is_killed_around_the_manifest(tmp_path: Path, place: str, left: int):
    log = tmp_path / "faults"
    fault = ("--failpoint", f"{place}:kill@skip=1", "--failpoint-log", str(log))
    with Fleet(NRANKS, coordinator_options=fault) as fleet:
        with dsml_gpu.connect(fleet.address, reconnect_s=0) as client:
            comm = client.communicator(NRANKS)
            arrays = arrays_on(comm, 1)
            comm.checkpoint(tmp_path / "c", {"a": arrays}).wait(WAIT_S)
            fill(arrays, 2)
            with pytest.raises(PeerUnavailable, match="coordinator"):
                comm.checkpoint(tmp_path / "c", {"a": arrays}).wait(WAIT_S)
        assert log.read_text().startswith(f"{place}:kill")
        addresses = [option for device in fleet.devices for option in ("--device", device.address)]
        with ServerProcess("coordinator", *addresses) as coordinator:
            assert assert_holds(coordinator.address, tmp_path / "c", left) == left
            with communicator(coordinator.address) as comm:
                comm.checkpoint(tmp_path / "c", {"a": arrays_on(comm, 3)}).wait(WAIT_S)
            assert_holds(coordinator.address, tmp_path / "c", 3)
            assert len(list((tmp_path / "c").iterdir())) == NRANKS + 1, "what the killed one left is still there"


def test_a_coordinator_that_is_killed_before_anything_is_restored(tmp_path: Path):
    """All has been read and found to be right; the next one can restore it."""
    log = tmp_path / "faults"
    with Fleet(NRANKS, coordinator_options=("--failpoint", "restore.checked:kill", "--failpoint-log", str(log))) as fleet:
        with dsml_gpu.connect(fleet.address, reconnect_s=0) as client:
            comm = client.communicator(NRANKS)
            arrays = arrays_on(comm, 1)
            comm.checkpoint(tmp_path / "c", {"a": arrays}).wait(WAIT_S)
            fill(arrays, 2)
            with pytest.raises(PeerUnavailable, match="coordinator"):
                comm.restore(tmp_path / "c", {"a": arrays}, timeout_s=WAIT_S)
        assert log.read_text().startswith("restore.checked:kill")
        addresses = [option for device in fleet.devices for option in ("--device", device.address)]
        with ServerProcess("coordinator", *addresses) as coordinator:
            assert assert_holds(coordinator.address, tmp_path / "c", 1) == 1


@pytest.mark.slow
def test_coordinators_killed_at_random_instants(tmp_path: Path):
    rng = random.Random(1)
    with Fleet(NRANKS) as fleet:
        addresses = [option for device in fleet.devices for option in ("--device", device.address)]
        done = 0
        for _ in range(4):
            coordinator = ServerProcess("coordinator", *addresses)
            try:
                with dsml_gpu.connect(coordinator.address, reconnect_s=0) as client:
                    comm = client.communicator(NRANKS)
                    arrays = arrays_on(comm, done + 1)
                    comm.checkpoint(tmp_path, {"a": arrays}).wait(WAIT_S)
                    done += 1
                    fill(arrays, done + 1)
                    job = comm.checkpoint(tmp_path, {"a": arrays})
                    job_or_death = threading.Timer(rng.uniform(0, 0.05), coordinator.process.kill)
                    job_or_death.start()
                    wait_until(lambda job=job: job.done, "the end of the job", SOON_S)
                    job_or_death.join()
                    coordinator.process.wait()
            finally:
                coordinator.stop()
            with ServerProcess("coordinator", *addresses) as next_one:
                done = assert_holds(next_one.address, tmp_path, done, done + 1)


def test_damage_changes_no_array_of_any_process(tmp_path: Path):
    with Fleet(NRANKS) as fleet, communicator(fleet.address) as comm:
        arrays = arrays_on(comm, 1)
        # The damaged rank has the most to read, so that it is the last one to find out.
        long = comm.array([np.zeros(64 * MIB if rank == NRANKS - 1 else 1, np.uint8) for rank in range(NRANKS)])
        comm.checkpoint(tmp_path, {"a": arrays, "long": long}).wait(WAIT_S)
        fill(arrays, 2)
        (file,) = tmp_path.glob("shard-*-00002-*")
        data = bytearray(file.read_bytes())
        data[-1] ^= 8
        file.write_bytes(data)
        with pytest.raises(CheckpointDamaged, match=rf"{file.name}: bytes \d+\.\.{len(data)} are not"):
            comm.restore(tmp_path, {"a": arrays, "long": long})
        for rank, array in enumerate(arrays):
            np.testing.assert_array_equal(array.get(), values(2, rank))


def test_a_folder_that_is_not_the_same_for_all():
    """Each process has a ``memory://`` of its own. The device that could not write for others goes on working."""
    with Fleet(NRANKS) as fleet, communicator(fleet.address) as comm:
        arrays = arrays_on(comm, 1)
        with pytest.raises(StorageUnavailable, match="cannot be seen by the coordinator; the folder must be the same"):
            comm.checkpoint("memory://folder", {"a": arrays}).wait(WAIT_S)
        comm.barrier()


def test_a_disk_that_fails_is_no_dead_device(tmp_path: Path):
    (tmp_path / "file").touch()
    with Fleet(NRANKS) as fleet, communicator(fleet.address) as comm:
        arrays = arrays_on(comm, 1)
        with pytest.raises(StorageUnavailable, match="File exists"):
            comm.checkpoint(tmp_path / "file" / "c", {"a": arrays}).wait(WAIT_S)
        comm.barrier()


@in_event_loop
async def test_a_spare_device_takes_what_a_rank_had() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as url, Fleet(2) as fleet:
        with communicator(fleet.address, 2) as comm:
            comm.empty(1000, np.uint8)
            kept = arrays_on(comm, 1), comm.array([np.full(5, rank, np.uint8) for rank in range(2)])
            comm.checkpoint(url, {"a": kept[0], "b": kept[1]}).wait(WAIT_S)
            addresses = {name: arrays[1].addr for name, arrays in zip("ab", kept, strict=True)}
        with ServerProcess("device", "--id", "7", "--memory", "64MiB") as spare, rpc_to(spare.address) as rpc:
            async with coordinating(spare.address) as coordinator:
                (handle,) = coordinator.registry.handles
                assert await saved_ranges(url, 1) == [
                    SavedRange("a", addresses["a"], values(1, 1).nbytes),
                    SavedRange("b", addresses["b"], 5),
                ]
                assert await restore_rank(url, handle, 1) == values(1, 1).nbytes + 5
                with pytest.raises(InvalidValue, match="has 2 ranks, and no rank 2"):
                    await restore_rank(url, handle, 2)
                with pytest.raises(CheckpointNotFound):
                    await restore_rank(f"{url}/nothing", handle, 0)

            def read(addr: int, nbytes: int) -> bytes:
                request = pb.StreamDeviceToHostRequest(memAddr=pb.MemAddr(value=addr), numBytes=nbytes)
                return b"".join(chunk.data for chunk in rpc.device.StreamDeviceToHost(request, timeout=CALL_TIMEOUT_S))

            assert read(addresses["a"], values(1, 1).nbytes) == values(1, 1).tobytes()
            assert read(addresses["b"], 5) == bytes([1] * 5)


@in_event_loop
async def test_a_spare_device_that_is_too_small() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as url, Fleet(1) as fleet:
        with communicator(fleet.address, 1) as comm:
            comm.empty(8 * MIB, np.uint8)
            filler = comm.empty(8 * MIB, np.uint8)
            comm.checkpoint(url, {"a": arrays_on(comm, 1)}).wait(WAIT_S)
            assert len(filler) == 1
        with ServerProcess("device", "--memory", "4MiB") as spare:
            async with coordinating(spare.address) as coordinator:
                with pytest.raises(AddressOutOfRange):
                    await restore_rank(url, coordinator.registry.handles[0], 0)
