"""What goes wrong while something else does: nobody can go on, a coordinator dies with a device, an end comes too late."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import ServerProcess
from dsml_gpu.errors import InternalError, NoAnswer
from dsml_gpu.memory.shared import can_share
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.coordinators import Coordinators
from tests.support.faults import kill
from tests.support.processes import wait_until
from tests.support.rpc import rpc_to

NRANKS = 3
LIMIT_S = 30.0
needs_shared_memory = pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's")


def contents(elements: int) -> list[np.ndarray]:
    return [np.arange(elements, dtype=np.int64) + 10**rank for rank in range(NRANKS)]


class Faulty:
    """Device servers, those of which have faults that are told of some, and coordinators one after the other."""

    def __init__(self, folder: Path, stack: ExitStack, faults: dict[int, str], options: tuple[str, ...]) -> None:
        self.log = folder / "device-faults"
        self.devices = [
            stack.enter_context(
                ServerProcess("device", "--id", str(rank + 1), "--memory", "256MiB", *self._order(faults.get(rank)))
            )
            for rank in range(NRANKS)
        ]
        self.coordinators = Coordinators(folder, self.devices, folder / "state", *options)
        stack.callback(self.coordinators.stop)
        for device in self.devices:
            stack.callback(device.process.send_signal, signal.SIGCONT)  # frozen ones are to end as well
        self.coordinators.start()
        self.client = stack.enter_context(
            dsml_gpu.connect(self.coordinators.address, timeout_s=LIMIT_S, reconnect_s=LIMIT_S)
        )
        self.pool = stack.enter_context(ThreadPoolExecutor(1))

    def _order(self, fault: str | None) -> list[str]:
        return [] if fault is None else ["--failpoint", fault, "--failpoint-log", str(self.log)]

    def await_fault(self, what: str) -> None:
        wait_until(lambda: self.log.exists() and what in self.log.read_text(), f"the fault {what}", LIMIT_S)


@contextmanager
def faulty(folder: Path, faults: dict[int, str], *options: str) -> Iterator[Faulty]:
    with ExitStack() as stack:
        yield Faulty(folder, stack, faults, options)


@needs_shared_memory
def test_what_nobody_can_bring_to_its_end_is_not_run_again_on_what_is_left_of_it(tmp_path: Path) -> None:
    """The first dies between its pieces, and those that are to go on in its place have a defect."""
    faults = {0: "passes.commit:kill@skip=3", 1: "passes.resume:fail", 2: "passes.resume:fail"}
    with faulty(tmp_path, faults, "--transport", "p2p") as world:
        comm = world.client.communicator(NRANKS)
        arrays = comm.array(contents(1_000_000))
        with pytest.raises(InternalError, match="what is in the buffers is not defined"):
            comm.all_reduce(arrays, timeout_s=LIMIT_S)
        assert len(world.log.read_text().splitlines()) == 3
        # It goes on without the one that died, with other data.
        for rank in (1, 2):
            arrays[rank].set(np.full(1_000_000, rank))
        result = comm.all_reduce(arrays, timeout_s=LIMIT_S)
        assert result is not None
        assert result.device_ids == (2, 3)
        assert (arrays[1].get() == 3).all()


@needs_shared_memory
@pytest.mark.parametrize(("elements", "place"), [(6000, "passes.staged"), (200_000, "passes.commit")])
def test_the_next_coordinator_has_others_go_on_for_a_device_that_died_too(tmp_path: Path, elements: int, place: str) -> None:
    """Where the dead one's memory is, only those know that have it open."""
    with faulty(tmp_path, {0: f"{place}:stop"}, "--transport", "p2p") as world:
        comm = world.client.communicator(NRANKS)
        inputs, out = comm.array(contents(elements)), comm.array([np.full(elements, -1)] * NRANKS)
        answer = world.pool.submit(lambda: comm.all_reduce(inputs, out, timeout_s=LIMIT_S))
        world.await_fault(place)
        world.coordinators.kill()
        kill(world.devices[0])
        world.coordinators.start()
        result = answer.result(LIMIT_S)
        assert (result.device_ids, result.transports) == ((1, 2, 3), ("p2p",))
        for rank in (1, 2):
            np.testing.assert_array_equal(out[rank].get(), sum(contents(elements)))


@needs_shared_memory
def test_what_the_next_coordinator_cannot_bring_to_its_end_is_not_run_again_by_it(tmp_path: Path) -> None:
    """Nor when the client asks for it once more."""
    faults = {0: "passes.commit:stop@skip=3", 1: "passes.resume:fail", 2: "passes.resume:fail"}
    with faulty(tmp_path, faults, "--transport", "p2p") as world:
        comm = world.client.communicator(NRANKS)
        arrays = comm.array(contents(1_000_000))
        answer = world.pool.submit(lambda: comm.all_reduce(arrays, timeout_s=LIMIT_S))
        world.await_fault("passes.commit")
        world.coordinators.kill()
        kill(world.devices[0])
        world.coordinators.start()
        with pytest.raises(InternalError, match="what is in the buffers is not defined"):
            answer.result(LIMIT_S)
        assert len(world.log.read_text().splitlines()) == 3
        assert comm.status()[0] == "FAILED"


def test_who_was_taken_in_is_not_taken_in_twice(tmp_path: Path) -> None:
    """The coordinator dies when it has begun the epoch, and has not answered."""
    with faulty(tmp_path, {}) as world:
        comm = world.client.communicator(NRANKS - 1)
        world.coordinators.kill()
        world.coordinators.start("outcomes.done:kill@method=CommGrow")
        answer = world.pool.submit(lambda: comm.grow(1))
        world.coordinators.ends()
        world.coordinators.start()
        answer.result(LIMIT_S)
        assert (comm.nranks, comm.epoch) == (NRANKS, 2)
        arrays = comm.array(contents(1000))
        comm.all_reduce(arrays)
        np.testing.assert_array_equal(arrays[2].get(), sum(contents(1000)))


@needs_shared_memory
@pytest.mark.parametrize("with_key", [True, False], ids=["with key", "without"])
def test_what_has_come_to_its_end_is_not_done_again_by_the_next_coordinator(tmp_path: Path, with_key: bool) -> None:
    """Its caller had given up; then there is other data where the results were."""
    with faulty(tmp_path, {0: "passes.staged:delay"}, "--transport", "p2p") as world:
        comm = world.client.communicator(NRANKS)
        arrays = comm.array(contents(60_000))
        if with_key:
            with pytest.raises(NoAnswer):
                comm.all_reduce(arrays, timeout_s=0.2)
        else:
            buffers = [pb.RankBuffers(sendAddr=array.addr, recvAddr=array.addr) for array in arrays]
            request = pb.CollectiveRequest(
                commId=comm.comm_id, kind=pb.CollectiveRequest.ALL_REDUCE, counts=[480_000], dtype=pb.INT64, buffers=buffers
            )
            with rpc_to(world.coordinators.address) as rpc, pytest.raises(grpc.RpcError):
                rpc.coordinator.Collective(request, timeout=0.2)
        world.await_fault("passes.staged")
        wait_until(lambda: comm.status()[0] == "FAILED", "the end", LIMIT_S)
        np.testing.assert_array_equal(arrays[0].get(), sum(contents(60_000)))
        for array in arrays:
            array.set(np.full(60_000, 7))
        world.coordinators.kill()
        world.coordinators.start()
        for array in arrays:
            assert (array.get() == 7).all()


@pytest.mark.slow  # for longer than the others wait, and they wait for five seconds
def test_who_does_not_undo_is_left_behind(tmp_path: Path) -> None:
    """It has ended its part, freezes for longer than the others wait for it to undo that, and wakes up."""
    faults = {0: "execute.done:stop", 1: "execute.done:fail"}
    with faulty(tmp_path, faults, "--transport", "grpc", "--dead-after", "60") as world:
        comm = world.client.communicator(NRANKS)
        arrays = comm.array(contents(60_000))
        answer = world.pool.submit(lambda: comm.all_reduce(arrays, algorithm="ring", timeout_s=LIMIT_S))
        for place in faults.values():
            world.await_fault(place)
        result = answer.result(LIMIT_S)
        world.devices[0].process.send_signal(signal.SIGCONT)
        assert result.device_ids == (2, 3)
        (lost,) = result.lost
        assert "has not undone" in lost.reason
        for rank in (1, 2):
            np.testing.assert_array_equal(arrays[rank].get(), contents(60_000)[1] + contents(60_000)[2])
