"""Passes over shared memory of several processes: whatever happens to one that works, all of it is done or nothing is.

Many devices in one fleet: each case has a victim of its own, and the last two devices outlive all of them.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import dsml_gpu
from dsml_gpu.cli.fleet import Fleet
from dsml_gpu.client.arrays import DeviceArray
from dsml_gpu.client.communicator import Communicator
from dsml_gpu.device.service import usable_cores
from dsml_gpu.errors import DsmlError
from dsml_gpu.memory.shared import can_share
from tests.support.processes import wait_until

pytestmark = pytest.mark.skipif(not can_share(), reason="memory is shared by memfd, which is Linux's")

#: One rank does all of it, in one message.
SMALL = 20_000
#: More than one does.
LARGE = 400_000
LIMIT_S = 30.0


@dataclass(frozen=True)
class Case:
    """What happens to a rank that works.

    Attributes:
        place, action: of the fault.
        elements: of each rank's buffer.
        rank: of the victim.
        in_place: the collective is.
        done: it is done all the same; otherwise nothing is.
        more: what happens to the first that goes on in its place.
        skip: so often the victim passes the place before.
        slow: it is tested with the slow ones.
    """

    place: str
    action: str
    elements: int
    rank: int = 0
    in_place: bool = True
    done: bool = True
    more: str = ""
    skip: int = 0
    slow: bool = False

    @property
    def faults(self) -> list[str]:
        return [f"{self.place}:{self.action}", self.more]

    def __str__(self) -> str:
        size = "large" if self.elements == LARGE else "small"
        more = f" then {self.more}" if self.more else ""
        return f"{self.place}:{self.action}@{self.rank},{self.skip} {size} {'in' if self.in_place else 'out of'} place{more}"


CASES = [
    # One rank has all the work.
    Case("execute.begin", "kill", SMALL, done=False),
    Case("execute.begin", "stop", SMALL, done=False, slow=True),
    Case("execute.begin", "fail", SMALL, in_place=False, done=False),
    Case("passes.staged", "kill", SMALL),
    Case("passes.staged", "stop", SMALL),
    Case("passes.staged", "fail", SMALL, slow=True),
    Case("passes.staged", "kill", SMALL, in_place=False, slow=True),
    Case("passes.commit", "stop", SMALL),
    Case("passes.commit", "kill", SMALL, in_place=False, slow=True),
    Case("passes.committed", "fail", SMALL, slow=True),
    Case("passes.staged", "kill", SMALL, more="passes.resume:kill"),
    Case("passes.commit", "stop", SMALL, more="passes.resume:stop", slow=True),
    # Two have, piece by piece; what one of them has not begun the other one does.
    Case("execute.begin", "kill", LARGE, rank=1),
    Case("execute.begin", "stop", LARGE, rank=0, slow=True),
    Case("passes.staged", "kill", LARGE, rank=0, slow=True),
    Case("passes.staged", "stop", LARGE, rank=1, skip=2),
    Case("passes.staged", "fail", LARGE, rank=1, skip=1),
    Case("passes.commit", "kill", LARGE, rank=0, skip=3, slow=True),
    Case("passes.commit", "stop", LARGE, rank=1, skip=1),
    Case("passes.committed", "kill", LARGE, rank=1, slow=True),
    Case("passes.staged", "stop", LARGE, rank=0, skip=1, more="passes.resume:kill"),
    Case("passes.commit", "kill", LARGE, rank=0, more="passes.resume:stop", slow=True),
    # And so that it can be done again.
    Case("execute.begin", "kill", LARGE, rank=1, in_place=False, slow=True),
    Case("passes.commit", "kill", LARGE, rank=1, in_place=False),
    Case("passes.commit", "stop", LARGE, rank=0, in_place=False),
    Case("passes.commit", "fail", LARGE, rank=1, in_place=False, slow=True),
]


@dataclass(frozen=True)
class World:
    """The fleet for some cases, and the faults that have happened in it."""

    cases: list[Case]
    fleet: Fleet
    client: dsml_gpu.Client
    log: Path

    def victims_of(self, case: Case) -> list[int]:
        return victims_of(self.cases, case)

    @property
    def survivors(self) -> list[int]:
        return [len(self.fleet.devices) - 1, len(self.fleet.devices)]

    def fired(self, device_id: int) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [line.split(" ")[0] for line in lines if f" device={device_id}" in f"{line} "]


def victims_of(cases: Sequence[Case], case: Case) -> list[int]:
    """Ids of the devices that do not survive it: one, and one more where two faults are ordered."""
    before = cases[: cases.index(case)]
    first = 1 + len(before) + sum(bool(one.more) for one in before)
    return [first, first + 1] if case.more else [first]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[bool], World]]:
    """The fleet of the slow cases, and of the others: a process for each victim, so only when it is needed."""
    with ExitStack() as stack:
        yield cache(lambda slow: stack.enter_context(world_of(slow, tmp_path_factory.mktemp("faults") / "log")))


@contextmanager
def world_of(slow: bool, log: Path) -> Iterator[World]:
    orders = []
    cases = [case for case in CASES if case.slow == slow]
    for case in cases:
        for device_id, fault, skip in zip(victims_of(cases, case), case.faults, (case.skip, 0), strict=False):
            orders += ["--failpoint", f"{fault}@device={device_id},skip={skip}"]
    devices = ["--backend", "numpy", "--memory", "16MiB", *orders, "--failpoint-log", str(log)]
    coordinator = ["--on-failure", "fail", "--heartbeat", "0.1", "--dead-after", "0.6"]
    ndevices = victims_of(cases, cases[-1])[-1] + 2
    with Fleet(ndevices, devices, coordinator) as fleet, dsml_gpu.connect(fleet.address) as client:
        yield World(cases, fleet, client, log)
        for device in fleet.devices:  # as fast as it goes
            device.process.kill()


def buffers_of(comm: Communicator, elements: int, seed: int) -> tuple[list[DeviceArray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    contents = [generator.integers(0, 1 << 40, elements) for _ in comm.devices]
    return comm.array(contents), contents


def assert_holds(arrays: Sequence[DeviceArray], expected: Sequence[np.ndarray], ranks: Sequence[int]) -> None:
    for rank in ranks:
        np.testing.assert_array_equal(arrays[rank].get(), expected[rank], err_msg=f"rank {rank}")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * case.slow, id=str(case)) for case in CASES])
def test_all_of_it_is_done_or_nothing_is(worlds: Callable[[bool], World], case: Case) -> None:
    if case.elements == LARGE and usable_cores() < 2:
        pytest.skip("on one core one rank does all of it")
    world = worlds(case.slow)
    victims = world.victims_of(case)
    device_ids = [*victims[1:], *world.survivors]
    device_ids.insert(case.rank, victims[0])
    left = [rank for rank, device_id in enumerate(device_ids) if device_id in world.survivors]
    comm = world.client.communicator(device_ids=device_ids)
    sources, before = buffers_of(comm, case.elements, 1)
    out, out_before = buffers_of(comm, case.elements, 2)
    failure = failure_of(lambda: comm.all_reduce(sources, None if case.in_place else out, timeout_s=LIMIT_S))
    for victim, fault in zip(victims, case.faults, strict=False):
        assert world.fired(victim) == [fault]
    assert (failure is None) == case.done, failure
    if case.action == "fail":  # it is there, and has what the others have
        left = list(range(len(device_ids)))
    total = [np.sum(before, axis=0)] * len(device_ids)
    if not case.in_place:
        assert_holds(sources, before, left)
        assert_holds(out, total if case.done else out_before, left)
    else:
        assert_holds(sources, total if case.done else before, left)
        assert_holds(out, out_before, left)
    frozen = [victim for victim, fault in zip(victims, case.faults, strict=False) if fault.endswith(":stop")]
    if frozen:
        assert_nothing_comes_late(world, frozen, [arrays[rank] for arrays in (sources, out) for rank in left])
    failure_of(comm.close)


def failure_of(call: Callable[[], object]) -> DsmlError | None:
    try:
        call()
    except DsmlError as error:
        return error
    return None


def assert_nothing_comes_late(world: World, frozen: Sequence[int], arrays: Sequence[DeviceArray]) -> None:
    """What survivors hold by then stays what it is when the victims go on with what they were at."""
    for number, array in enumerate(arrays):
        array.set(np.full(array.shape, number, array.dtype))
    for device_id in frozen:
        world.fleet.devices[device_id - 1].process.send_signal(signal.SIGCONT)
    wait_until(lambda: {*frozen} <= {device.device_id for device in world.client.devices()}, "the victims to be back")
    for number, array in enumerate(arrays):
        assert (array.get() == number).all()
