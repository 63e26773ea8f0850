"""Devices that die at every place of their code, at every rank, in every phase of an operation and of its recovery.

    python -m tests.recovery.failpoint_matrix                 # all of them, some five minutes
    python -m tests.recovery.failpoint_matrix "p2p restore"   # those whose names have all of these words
    python -m tests.recovery.failpoint_matrix --list

Each case orders one fault or two, all of which must happen. Whatever happens, the operation answers within ten seconds, and
what it says is so: every element of every rank that is left is looked at. Then the communicator must work on.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsml_gpu.chaos.checks import expected
from dsml_gpu.chaos.exercise import HANG_S, Exercise
from dsml_gpu.chaos.fleets import OwnFleet
from dsml_gpu.chaos.operations import Operation
from dsml_gpu.chaos.report import AS_BEFORE, LOST, ON_ALL, RESTARTED
from dsml_gpu.coordinator.passes import Team
from dsml_gpu.device.service import usable_cores
from dsml_gpu.errors import DsmlError, OperationTimeout

NRANKS = 3
#: Of which two can take the place of others.
NDEVICES = 5
DEVICE_OPTIONS = ("--memory", "64MiB", "--slice", "16KiB")
#: Bytes of a rank's buffer: over shared memory one rank does all of it; more than one do.
SMALL, LARGE = 480_000, 3_200_000


@dataclass(frozen=True)
class Case:
    """One operation, and what happens in it.

    Attributes:
        transport: over which it goes; with ``grpc`` as a ring. ``checkpoint``: instead of it a checkpoint is made, and
            restored.
        nbytes: of each rank's buffer.
        faults: which device, by its place in the fleet (those from `NRANKS` on are spares), and its order.
        ends: how it may end.
    """

    transport: str
    nbytes: int
    in_place: bool
    on_failure: str
    faults: tuple[tuple[int, str], ...]
    ends: tuple[str, ...]

    @property
    def operation(self) -> Operation:
        algorithm = "ring" if self.transport == "grpc" else "direct"
        return Operation(
            "all_reduce", NRANKS, self.nbytes // 8, "int64", "sum", algorithm, self.transport, in_place=self.in_place
        )

    def __str__(self) -> str:
        size = "large" if self.nbytes == LARGE else "small"
        faults = " then ".join(f"{order} at {rank}" for rank, order in self.faults)
        return f"{self.transport} {size} {'in' if self.in_place else 'out of'} place {self.on_failure}: {faults}"


# ---- which cases there are ------------------------------------------------------------------------------------------------

#: Places of a device server's code that are met while an operation runs, by transport. A ring of 480 KB in slices of 16 KiB
#: has more than forty at each rank.
_GRPC = ("execute.begin", "execute.slice", "execute.slice@skip=20", "execute.slice@skip=40", "execute.done")
#: By passes: where one rank has staged all, before it writes; where ranks go piece by piece; where nothing is overwritten.
_RUN = ("execute.begin", "passes.staged", "passes.commit", "passes.committed")
_PIECES = (
    "execute.begin",
    "passes.staged",
    "passes.staged@skip=2",
    "passes.commit",
    "passes.commit@skip=3",
    "passes.committed",
)
_COMMIT = ("execute.begin", "passes.commit", "passes.committed")
#: Places that others meet when one has died: what it did is undone, and they join the next epoch.
_RECOVERY = (
    "settle.begin@settlement=ROLL_BACK",
    "settle.done@settlement=ROLL_BACK",
    "comm.join@epoch=2",
    "comm.joined@epoch=2",
)
#: And when all has gone well: they hear that what they have kept is not needed any more.
_AFTER = ("settle.begin@settlement=COMMIT", "settle.done@settlement=COMMIT")

#: While a checkpoint is written, after one that is complete; and while one is restored.
_SAVING = ("shard.begin@skip=1", "shard.written@skip=1", "shard.end@skip=1")
_LOADING = "shard.load"

#: Places that this matrix does not meet, and the tests that do.
ELSEWHERE = {
    "round.begin": "tests/servers/test_resume.py",
    "round.begun": "tests/servers/test_resume.py",
    "round.done": "tests/servers/test_resume.py",
    "round.recorded": "tests/servers/test_resume.py",
    "outcomes.done": "tests/servers/test_resume.py",
    "outcomes.kept": "tests/servers/test_resume.py",
    "restore.checked": "tests/servers/test_checkpoints.py",
    "checkpoint.manifest": "tests/servers/test_checkpoints.py",
    "checkpoint.complete": "tests/servers/test_checkpoints.py",
}


def workers(nbytes: int) -> range:
    """The ranks that run passes; the others have nothing to do, and meet no place."""
    if nbytes == SMALL:
        return range(1)
    return range(len(Team(NRANKS, usable_cores()).workers(2 * NRANKS * nbytes)))


def order(place: str, action: str = "kill") -> str:
    """A fault, from a place and its conditions."""
    name, _, conditions = place.partition("@")
    return f"{name}:{action}" + (f"@{conditions}" if conditions else "")


def cases() -> list[Case]:
    """All of them, in the order in which they are told."""
    return [*_one_dies(), *_one_freezes(), *_two_die(), *_after_the_end(), *_places_are_taken(), *_checkpoints()]


def _one_dies() -> Iterator[Case]:
    for on_failure, in_place in itertools.product(("shrink", "fail"), (True, False)):
        undone = RESTARTED if on_failure == "shrink" else AS_BEFORE
        for rank, place in itertools.product(range(NRANKS), _GRPC):
            yield Case("grpc", SMALL, in_place, on_failure, ((rank, order(place)),), (undone,))
        large = _PIECES if in_place else _COMMIT
        for nbytes, places in ((SMALL, _RUN), (LARGE, large)):
            for rank, place in itertools.product(workers(nbytes), places):
                # Before anything is staged all is undone, where one rank does all of it. What others have begun, or can do
                # in its place, is brought to its end.
                ends = (undone,) if nbytes == SMALL and place == "execute.begin" else (ON_ALL,)
                yield Case("p2p", nbytes, in_place, on_failure, ((rank, order(place)),), ends)


def _one_freezes() -> Iterator[Case]:
    for rank, place in itertools.product(range(NRANKS), ("execute.slice@skip=20", "execute.done")):
        yield Case("grpc", SMALL, True, "shrink", ((rank, order(place, "stop")),), (RESTARTED,))
    for place in _RUN[1:]:
        yield Case("p2p", SMALL, True, "shrink", ((0, order(place, "stop")),), (ON_ALL,))
    for rank, place in itertools.product(workers(LARGE), ("passes.staged@skip=2", "passes.commit@skip=3")):
        yield Case("p2p", LARGE, True, "shrink", ((rank, order(place, "stop")),), (ON_ALL,))


def _two_die() -> Iterator[Case]:
    for first, second in itertools.permutations(range(NRANKS), 2):
        for place in _RECOVERY:
            faults = ((first, order("execute.slice@skip=20")), (second, order(place)))
            yield Case("grpc", SMALL, True, "shrink", faults, (RESTARTED,))
    # The first that goes on in the place of one that has died, which is the lowest other rank, dies as well.
    for nbytes in (SMALL, LARGE):
        for place in ("passes.staged", "passes.commit"):
            yield Case("p2p", nbytes, True, "shrink", ((0, order(place)), (1, order("passes.resume"))), (ON_ALL,))
    for second in (1, 2):
        for place in _RECOVERY[2:]:
            faults = ((0, order("execute.begin")), (second, order(place)))
            yield Case("p2p", SMALL, True, "shrink", faults, (RESTARTED,))
        # What others may still write to is moved when one is frozen.
        faults = ((0, order("passes.staged", "stop")), (second, order("memory.move")))
        yield Case("p2p", SMALL, True, "shrink", faults, (ON_ALL,))


def _after_the_end() -> Iterator[Case]:
    for rank, place in itertools.product(range(NRANKS), _AFTER):
        yield Case("grpc", LARGE, True, "shrink", ((rank, order(place)),), (ON_ALL,))


def _places_are_taken() -> Iterator[Case]:
    """Spares take the places of those that die. The first spare is device 4, of the place 3."""
    for in_place, rank in itertools.product((True, False), range(NRANKS)):
        for place in ("execute.begin", "execute.slice@skip=20", "execute.done"):
            yield Case("grpc", SMALL, in_place, "restore", ((rank, order(place)),), (RESTARTED,))
        dies = (rank, order("execute.slice@skip=20"))
        for place in ("shard.load", *_RECOVERY[2:]):
            yield Case("grpc", SMALL, in_place, "restore", (dies, (NRANKS, order(place))), (RESTARTED,))
        other = (rank + 1) % NRANKS
        for place in _RECOVERY:
            yield Case("grpc", SMALL, in_place, "restore", (dies, (other, order(place))), (RESTARTED,))
    for in_place in (True, False):
        yield Case("p2p", SMALL, in_place, "restore", ((0, order("execute.begin")),), (RESTARTED,))
        faults = ((0, order("execute.begin")), (NRANKS, order("shard.load")))
        yield Case("p2p", SMALL, in_place, "restore", faults, (RESTARTED,))


def _checkpoints() -> Iterator[Case]:
    """Instead of the operation, a checkpoint; or one is restored."""
    for rank, place in itertools.product(range(NRANKS), (*_SAVING, _LOADING)):
        yield Case("checkpoint", SMALL, True, "shrink", ((rank, order(place)),), (LOST,))


# ---- how they are run -----------------------------------------------------------------------------------------------------


def run(fleet: OwnFleet, case: Case, seed: int = 1) -> list[str]:
    """Runs a case; returns what was wrong, with faults that did not happen."""
    device_ids = fleet.members(NDEVICES, dict(case.faults))
    try:
        if case.transport == "checkpoint":
            wrong = _run_checkpoint(fleet, case, device_ids)
        elif case.on_failure == "restore":
            wrong = _run_with_spares(fleet, case, device_ids, seed)
        else:
            wrong = _run(fleet, case, device_ids, seed)
    except DsmlError as error:
        wrong = [f"{type(error).__name__}: {error}"]
    finally:
        for rank, _ in case.faults:
            fleet.repair(device_ids[rank])
    return wrong + [
        f"{what} at {rank} did not happen" for rank, what in case.faults if fleet.fired_s(device_ids[rank]) is None
    ]


def _run(fleet: OwnFleet, case: Case, device_ids: Sequence[int], seed: int) -> list[str]:
    with Exercise(fleet.client, device_ids[:NRANKS], case.operation, seed, on_failure=case.on_failure) as exercise:
        exercise.harmed.update(rank for rank, _ in case.faults)
        answer = exercise.run()
        ended, wrong = exercise.judge(answer)
        if ended not in case.ends:
            wrong.append(f"ended {ended}, expected {' or '.join(case.ends)}: {answer.note}")
        if ended in (ON_ALL, RESTARTED) and case.on_failure != "fail":
            wrong += exercise.go_on()
            wrong += exercise.go_on()
    return wrong


def _run_with_spares(fleet: OwnFleet, case: Case, device_ids: Sequence[int], seed: int) -> list[str]:
    operation, wrong = case.operation, []
    with (
        tempfile.TemporaryDirectory() as folder,
        Exercise(fleet.client, device_ids[:NRANKS], operation, seed, on_failure="restore") as exercise,
    ):
        exercise.save(Path(folder) / "checkpoint")
        answer = exercise.run()
        if answer.result is None:
            return [f"it failed: {answer.note}"]
        harmed = {device_ids[rank] for rank, _ in case.faults}
        members = answer.result.device_ids
        if len(members) != NRANKS or harmed & {*members}:
            wrong.append(f"devices {members} took part, of which {sorted(harmed & {*members})} have died")
        result = expected(operation, exercise.contents, range(NRANKS))
        for rank, buffers in exercise.read().items():
            for name, array in buffers.named().items():
                if not np.array_equal(array, result[rank].named()[name]):
                    wrong.append(f"rank {rank} of devices {members}, {name}: not what all ranks had, or their sum")
        again = exercise.run()
        if again.result is None:
            wrong.append(f"the next operation failed: {again.note}")
    return wrong


def _run_checkpoint(fleet: OwnFleet, case: Case, device_ids: Sequence[int]) -> list[str]:
    """Makes two checkpoints, and restores the last complete one, at first on all ranks, then on those that are left."""
    ((_, what),) = case.faults
    first, second = ([np.full(case.nbytes // 8, 10 * number + rank) for rank in range(NRANKS)] for number in (1, 2))
    with tempfile.TemporaryDirectory() as folder, fleet.client.communicator(device_ids=device_ids[:NRANKS]) as comm:
        arrays = comm.array(first)
        comm.checkpoint(folder, {"x": arrays}).wait(HANG_S)
        for array, data in zip(arrays, second, strict=True):
            array.set(data)
        try:
            if what.startswith(_LOADING):
                comm.restore(folder, {"x": arrays}, timeout_s=HANG_S)
            else:
                comm.checkpoint(folder, {"x": arrays}).wait(HANG_S)
        except OperationTimeout as error:
            return [f"no answer: {error}"]
        except DsmlError:
            pass
        else:
            return ["it ended well, without a rank"]
        comm.all_reduce(arrays, op="max")  # goes on without the victim
        restored = comm.restore(folder, timeout_s=HANG_S)["x"]
        if not np.array_equal(np.concatenate([array.get() for array in restored]), np.concatenate(first)):
            return ["it is not the last complete checkpoint that was restored"]
    return []


def main(*words: str) -> int:
    """Runs the cases that have all these words in their names; returns the exit status."""
    chosen = [case for case in cases() if all(word in str(case) for word in words if word != "--list")]
    if "--list" in words:
        print(*chosen, sep="\n")
        return 0
    failed = 0
    with OwnFleet(NDEVICES, DEVICE_OPTIONS) as fleet:
        for case in chosen:
            wrong = run(fleet, case)
            failed += bool(wrong)
            print(f"{'passed' if not wrong else 'FAILED'}  {case}", *wrong, sep="\n        ", flush=True)
    print(
        f"{len(chosen) - failed} of {len(chosen)} cases passed, in each of which all its faults happened; {HANG_S:g} s each"
    )
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(*(word for argument in sys.argv[1:] for word in argument.split())))
