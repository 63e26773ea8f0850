"""An operation that stands still: the error names the rank that holds it up, what it has not sent, and who waits."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet, ServerProcess
from dsml_gpu.coordinator.server import CoordinatorConfig, CoordinatorServer
from dsml_gpu.coordinator.settings import CoordinatorSettings
from dsml_gpu.errors import OperationTimeout, PeerUnavailable
from dsml_gpu.wire import gpu_sim_pb2 as pb
from tests.support.in_this_process import heard_of, in_event_loop

NRANKS = 4
#: 1 MiB: each of the four chunks has sixteen slices.
ELEMENTS = 1 << 17
LIMIT_S = 30.0


def assert_says(error: Exception, number: int, addresses: Sequence[str]) -> None:
    """It is about rank 2 in a ring, whose chunks and steps belong together."""
    pattern = (
        rf"all_reduce #{number} \(ring, 1 MiB, epoch 1\): rank 2 \(device 3 at {re.escape(addresses[2])}\) has not sent "
        r"chunk ([0-3]) of step ([1-6])/6 for (\d+\.\d) s; ranks 0, 1, 3 wait for it"
    )
    match = re.fullmatch(pattern, str(error))
    assert match, error
    chunk, step, waited_s = int(match[1]), int(match[2]), float(match[3])
    assert chunk == (2 - step) % NRANKS, "rank 2 sends another one in that step"
    assert 0.4 < waited_s < 4  # the timeout is 0.5 or 1, and is noticed within twice that


@pytest.mark.slow  # the stopped rank is given 5 s to settle the round
@pytest.mark.parametrize("atomic", ["--atomic", "--no-atomic"])
def test_a_stopped_rank_is_blamed_and_not_those_that_wait(tmp_path: Path, atomic: str) -> None:
    """Rank 2 stops in the middle of the second step. Ranks 3, 0 and 1 wait, each for the one before it."""
    log = tmp_path / "faults"
    fault = "execute.slice:stop@rank=2,skip=40"
    devices = ["--memory", "64MiB", "--slice", "16KiB", "--failpoint", fault, "--failpoint-log", str(log)]
    options = ["--transport", "grpc", "--stall-timeout", "1", "--dead-after", "60", "--on-failure", "fail", atomic]
    with Fleet(NRANKS, devices, options) as fleet, dsml_gpu.connect(fleet.address) as client:
        comm = client.communicator(NRANKS)
        arrays = comm.array([np.ones(ELEMENTS)] * NRANKS)
        with pytest.raises(PeerUnavailable) as raised:
            comm.all_reduce(arrays, algorithm="ring", timeout_s=LIMIT_S)
        assert log.read_text().startswith("execute.slice:stop")
        fleet.devices[2].process.kill()  # it would not end when told to
        assert_says(raised.value, 1, [device.address for device in fleet.devices])
        assert comm.status() == ("FAILED", str(raised.value))


class NotReached:
    """A connection by which some messages do not get through."""

    def __init__(self, connection: Any, method: str) -> None:
        self._connection = connection
        self._method = method
        self.lost = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def call(self, method: str, request: Any, timeout_s: float | None) -> Any:
        if method == self._method:
            self.lost += 1
            await asyncio.Event().wait()
        return await self._connection.call(method, request, timeout_s)


@in_event_loop
async def test_who_answers_but_sends_nothing_is_blamed_and_left_behind() -> None:
    """Rank 2 never hears of the operation, and answers whatever it is asked; first where that only fails."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(ServerProcess("device", "--id", str(number), "--memory", "16MiB", wait=False))
            for number in range(1, NRANKS + 1)
        ]
        for server in servers:
            server.wait_until_ready()
        addresses = tuple(server.address for server in servers)
        settings = CoordinatorSettings(transport=pb.GRPC, stall_timeout_s=0.5)
        coordinator = CoordinatorServer(CoordinatorConfig(port=0, devices=addresses, embedded=0, settings=settings))
        await coordinator.start()
        try:
            await heard_of(coordinator)
            handle = coordinator.registry.handles[2]
            handle._connection = connection = NotReached(handle._connection, "Execute")
            await asyncio.to_thread(fails_then_goes_on, coordinator.address, addresses)
            assert connection.lost == 2
        finally:
            await coordinator.stop(2.0)


def fails_then_goes_on(address: str, addresses: Sequence[str]) -> None:
    contents = [np.full(ELEMENTS, 10.0**rank) for rank in range(NRANKS)]
    with dsml_gpu.connect(address) as client:
        with client.communicator(NRANKS, on_failure="fail") as comm:
            arrays = comm.array(contents)
            with pytest.raises(OperationTimeout) as raised:
                comm.all_reduce(arrays, algorithm="ring", timeout_s=LIMIT_S)
            assert_says(raised.value, 1, addresses)
            np.testing.assert_array_equal(arrays[0].get(), contents[0])
        with client.communicator(NRANKS, on_failure="shrink") as comm:
            arrays = comm.array(contents)
            result = comm.all_reduce(arrays, algorithm="ring", timeout_s=LIMIT_S)
            assert result is not None
            assert (result.device_ids, result.epoch) == ((1, 2, 4), 2)
            (lost,) = result.lost
            assert re.search(r"device 3 at \S+ has not sent chunk 1 of step 1/6 for \d\.\d s; ranks 0, 1, 3", lost.reason)
            for rank in (0, 1, 3):
                assert set(arrays[rank].get()) == {1011.0}
