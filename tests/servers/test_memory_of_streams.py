"""What device servers need while slices go from one to the other: memory for slices, whatever the length of the buffers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
import pytest

from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.client import connect
from tests.support.faults import frozen
from tests.support.rpc import GIB, MIB

RANKS = 4
SIZE = 96 * MIB


class Watch:
    """Samples, in a thread, the memory that a fleet's devices have for themselves; keeps how far each has grown at most."""

    def __init__(self, fleet: Fleet) -> None:
        self._processes = [psutil.Process(device.process.pid) for device in fleet.devices]
        self._before = [self._own(process) for process in self._processes]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.growth = [0] * len(self._processes)

    @staticmethod
    def _own(process: psutil.Process) -> int:
        # Device memory that is shared counts as resident from when the server itself touches it.
        info = process.memory_info()
        return int(info.rss - getattr(info, "shared", 0))

    def _run(self) -> None:
        while not self._ended.wait(0.005):
            self.growth = [
                max(growth, self._own(process) - before)
                for growth, process, before in zip(self.growth, self._processes, self._before, strict=True)
            ]

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()


def allowed_growth(nbytes: int) -> int:
    """What a server may take beside its device memory: two windows of 4 MiB, what gRPC has under way in the first
    operation, and what glibc keeps of both; less than the buffer."""
    return max(80 * MIB, nbytes // 6)


@contextmanager
def fleet_of(nbytes: int) -> Iterator[Fleet]:
    # What ranks keep of their buffers while a collective runs is as large as the buffers, and not what this is about; and
    # a device that is frozen for a while is not to be given up.
    with Fleet(RANKS, ["--memory", str(nbytes + 8 * MIB)], ["--no-atomic", "--dead-after", "60"]) as fleet:
        yield fleet


SIZES = [
    pytest.param(SIZE, id="96 MiB"),
    pytest.param(GIB, id="1 GiB", marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
]


@pytest.mark.parametrize("nbytes", SIZES)
def test_a_ring_takes_memory_of_slices_not_of_buffers(nbytes: int):
    with fleet_of(nbytes) as fleet, connect(fleet.address) as client:
        with client.communicator(RANKS, transport="grpc") as comm:
            ones = np.ones(nbytes // 8)
            arrays = comm.array([ones] * RANKS)
            del ones
            with Watch(fleet) as watch:
                for _ in range(3):  # the first goes through gRPC, the others by the data ports
                    comm.all_reduce(arrays, algorithm="ring")
            for array in arrays:
                values = array.get()
                assert np.all(values == RANKS**3)
                del values
        assert max(watch.growth) < allowed_growth(nbytes), [growth / MIB for growth in watch.growth]


def test_a_frozen_receiver_stops_its_sender_and_fills_nobody():
    """The ring stands still behind a frozen device; awake, it goes on as if nothing had been."""
    with fleet_of(SIZE) as fleet, connect(fleet.address) as client:
        with client.communicator(RANKS, transport="grpc") as comm:
            arrays = comm.array([np.ones(SIZE // 8)] * RANKS)
            comm.all_reduce(arrays, algorithm="ring")  # now the data ports are known
            with Watch(fleet) as watch:
                operation = threading.Thread(target=comm.all_reduce, args=(arrays,), kwargs={"algorithm": "ring"})
                with frozen(fleet.devices[1]):
                    operation.start()
                    operation.join(2.0)
                    assert operation.is_alive(), "nobody waited for the frozen device"
                operation.join(60.0)
                assert not operation.is_alive()
            assert np.all(arrays[0].get() == RANKS**2)
        assert max(watch.growth) < allowed_growth(SIZE), [growth / MIB for growth in watch.growth]
