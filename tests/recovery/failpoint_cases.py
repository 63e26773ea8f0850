"""Which cases the matrix of failpoints has: every place of the code, at every rank, in every way that an operation can go.

Pure data; `tests.recovery.failpoint_matrix` runs it. A case orders faults at places (`dsml_gpu.failpoints`). Where a place
cannot be met in some way, there is a case that says why, and that is run as well: its faults must not happen.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from dsml_gpu.chaos.operations import Operation
from dsml_gpu.chaos.report import AS_BEFORE, LOST, ON_ALL, RESTARTED
from dsml_gpu.coordinator.passes import Team
from dsml_gpu.device.service import usable_cores

NRANKS = 3
#: Of which two can take the place of others.
NDEVICES = 5
#: Bytes of a rank's buffer: over shared memory one rank does all of it; more than one do.
SMALL, LARGE = 480_000, 3_200_000
#: In place of a device: the fault is the coordinator's.
COORDINATOR = -1


@dataclass(frozen=True)
class Way:
    """How an all-reduce goes.

    Attributes:
        transport: ``grpc``, as a ring, or ``p2p``, directly. ``checkpoint``: instead of it a checkpoint is made, or
            restored.
        nbytes: of each rank's buffer.
        lane: the coordinator reaches devices by lanes of the same host, and so knows at once which of them are there.
    """

    transport: str
    nbytes: int
    in_place: bool
    lane: bool = True

    @property
    def operation(self) -> Operation:
        algorithm = "ring" if self.transport == "grpc" else "direct"
        return Operation(
            "all_reduce", NRANKS, self.nbytes // 8, "int64", "sum", algorithm, self.transport, in_place=self.in_place
        )

    @property
    def phase(self) -> str:
        """Of ``ExecuteRequest``, in which ranks with work do it; that of a ring has no name."""
        if self.transport != "p2p":
            return ""
        if self.nbytes == SMALL:
            return "RUN"
        return "PIECES" if self.in_place else "COMMIT"

    @property
    def workers(self) -> range:
        """The ranks that have work."""
        if self.phase in ("", "RUN"):
            return range(1 if self.phase else NRANKS)
        return range(len(Team(NRANKS, usable_cores()).workers(2 * NRANKS * self.nbytes)))

    def __str__(self) -> str:
        size, lane = "large" if self.nbytes == LARGE else "small", "" if self.lane else " without lanes"
        return f"{self.transport} {size} {'in' if self.in_place else 'out of'} place{lane}"


@dataclass(frozen=True)
class Case:
    """One operation, and what happens in it.

    Attributes:
        faults: which device, by its place in the fleet (those from `NRANKS` on are spares), or `COORDINATOR`, and its order,
            as `failpoints.parse` takes it.
        ends: how it may end.
        kills: a device whose process is killed when all faults have happened.
        unmet: why none of the faults can happen; empty: all must.
    """

    way: Way
    on_failure: str
    faults: tuple[tuple[int, str], ...]
    ends: tuple[str, ...]
    kills: int | None = None
    unmet: str = ""

    @property
    def victims(self) -> set[int]:
        """The devices that die, or freeze."""
        ends = {device for device, what in self.faults if ":delay" not in what and not self.unmet}
        return ends - {COORDINATOR} if self.kills is None else ends | {self.kills}

    def __str__(self) -> str:
        at = [f"{order} at {'coordinator' if device == COORDINATOR else device}" for device, order in self.faults]
        killed = "" if self.kills is None else f" then {self.kills} is killed"
        return f"{self.way} {self.on_failure}: {' then '.join(at)}{killed}{' cannot be' * bool(self.unmet)}"


GRPC = [Way("grpc", SMALL, in_place) for in_place in (True, False)]
P2P = [Way("p2p", nbytes, in_place) for nbytes in (SMALL, LARGE) for in_place in (True, False)]
#: The coordinator has to ask ranks without work whether they are there.
NO_LANE = [Way("p2p", nbytes, in_place, lane=False) for nbytes, in_place in ((SMALL, True), (LARGE, True), (LARGE, False))]

#: Places of a device server's code that are met while an operation runs, when nothing else has happened.
OF_OPERATIONS = ("execute.begin", "execute.slice", "execute.done", "passes.staged", "passes.commit", "passes.committed")
#: How often they are passed before. A ring of 480 KB in slices of 16 KiB has more than forty slices at each rank.
_SKIPS = {
    ("execute.slice", ""): (0, 20, 40),
    ("passes.staged", "PIECES"): (0, 2),
    ("passes.commit", "PIECES"): (0, 3),
}
#: Those of the coordinator.
OF_COORDINATOR = ("round.begin", "round.begun", "round.done", "round.recorded", "outcomes.done", "outcomes.kept")

#: Places that others meet when one has died: what it did is undone, and they join the next epoch.
_UNDONE = ("settle.begin@settlement=ROLL_BACK", "settle.done@settlement=ROLL_BACK")
_JOINED = ("comm.join@epoch=2", "comm.joined@epoch=2")
#: And when all has gone well: they hear that what they have kept is not needed any more.
_AFTER = ("settle.begin@settlement=COMMIT", "settle.done@settlement=COMMIT")
#: While a checkpoint is written, after one that is complete.
_SAVING = ("shard.begin@skip=1", "shard.written@skip=1", "shard.end@skip=1")
#: While one is restored, and by who takes the place of another one.
LOADING = "shard.load"

#: Places that this matrix does not meet, and the tests that do.
ELSEWHERE = {
    "restore.checked": "tests/servers/test_checkpoints.py",
    "checkpoint.manifest": "tests/servers/test_checkpoints.py",
    "checkpoint.complete": "tests/servers/test_checkpoints.py",
}


def why_unmet(place: str, way: Way, rank: int) -> str:
    """Why a rank does not come to one of `OF_OPERATIONS` while an operation goes well; empty: it does."""
    if way.transport == "grpc":
        return "ranks send to each other, there are no passes" if place.startswith("passes.") else ""
    if place in ("execute.slice", "execute.done"):
        return "ranks read each other's memory, nothing is sent"
    if place == "passes.staged" and way.phase == "COMMIT":
        return "nothing is overwritten that is read, so nothing is staged"
    if rank not in way.workers and (way.lane or place != "execute.begin"):
        return "a rank without work is not asked for any, and its connection tells that it is there"
    return ""


def why_coordinator_unmet(place: str, way: Way) -> str:
    """The same of the coordinator, and `OF_COORDINATOR`."""
    if place == "round.begin" and way.transport == "p2p" and way.lane:
        return "nobody has to be asked first"
    if place == "round.begun" and way.transport == "grpc":
        return "what has begun can be undone, so nobody has to know of it"
    return ""


def cases() -> list[Case]:
    """All of them, in the order in which they are told."""
    kinds = (
        _one_dies(), _one_is_not_there(), _one_freezes(), _two_die(), _after_the_end(),
        _places_are_taken(), _checkpoints(), _coordinator_dies(), _cannot_be(),
    )  # fmt: skip
    return list(itertools.chain(*kinds))


def order(place: str, action: str = "kill", *conditions: str) -> str:
    """A fault, from a place that may have conditions, and more of them."""
    name, _, some = place.partition("@")
    every = ",".join(filter(None, (some, *conditions)))
    return f"{name}:{action}" + (f"@{every}" if every else "")


def _visits(place: str, way: Way, action: str = "kill") -> list[str]:
    """Orders for a place, in the phase that it is met in; of one that is met often, several."""
    phase = f"phase={way.phase}" if place.startswith("passes.") else ""
    skips = _SKIPS.get((place, way.phase), (0,))
    return [order(place, action, phase, f"skip={skip}" if skip else "") for skip in skips]


def _undone(on_failure: str) -> str:
    return AS_BEFORE if on_failure == "fail" else RESTARTED


def _end(place: str, way: Way, on_failure: str) -> str:
    """How an operation ends one of whose ranks comes to a place and no further.

    A ring is undone, until all have heard that all are done. Of passes that one rank does all is undone before anything is
    staged. What others have begun, or can do in its place, is brought to its end.
    """
    if way.transport == "grpc" or (way.phase == "RUN" and place == "execute.begin"):
        return _undone(on_failure)
    return ON_ALL


def _one_dies() -> Iterator[Case]:
    for on_failure, way, rank, place in itertools.product(("shrink", "fail"), GRPC + P2P, range(NRANKS), OF_OPERATIONS):
        if not why_unmet(place, way, rank):
            for what in _visits(place, way):
                yield Case(way, on_failure, ((rank, what),), (_end(place, way, on_failure),))


def _one_is_not_there() -> Iterator[Case]:
    """All are asked first (PREPARE), which each of them meets as it meets the begin of its work."""
    for way, rank in itertools.product(NO_LANE, range(NRANKS)):
        for on_failure in ("shrink", "fail"):
            yield Case(way, on_failure, ((rank, order("execute.begin")),), (_undone(on_failure),))
        if rank in way.workers:
            end = _end("execute.begin", way, "shrink")
            yield Case(way, "shrink", ((rank, order("execute.begin@skip=1")),), (end,))
    yield Case(NO_LANE[0], "shrink", ((2, order("execute.begin", "stop")),), (RESTARTED,))


def _one_freezes() -> Iterator[Case]:
    """Each takes the two seconds after which a device is given up: not the full product."""
    for rank, what in itertools.product(range(NRANKS), ("execute.slice:stop@skip=20", "execute.done:stop")):
        yield Case(GRPC[0], "shrink", ((rank, what),), (RESTARTED,))
    yield Case(GRPC[1], "fail", ((1, "execute.slice:stop@skip=20"),), (AS_BEFORE,))
    for on_failure, way in itertools.product(("shrink", "fail", "restore"), (GRPC[0], P2P[0], P2P[2])):
        yield Case(way, on_failure, ((0, order("execute.begin", "stop")),), (_end("execute.begin", way, on_failure),))
    for way, place in itertools.product(P2P, ("passes.staged", "passes.commit")):
        for rank in way.workers if way.in_place else way.workers[-1:]:
            if not why_unmet(place, way, rank):
                yield Case(way, "shrink", ((rank, _visits(place, way, "stop")[-1]),), (ON_ALL,))


def _two_die() -> Iterator[Case]:
    begun, half = order("execute.begin"), order("execute.slice@skip=20")
    for first, second in itertools.permutations(range(NRANKS), 2):
        for place in _UNDONE + _JOINED:
            yield Case(GRPC[0], "shrink", ((first, half), (second, order(place))), (RESTARTED,))
    for way, second, place in itertools.product(GRPC, (1, 2), _UNDONE):
        yield Case(way, "fail", ((0, half), (second, order(place))), (AS_BEFORE,))
    # The first that goes on in the place of one that has died, which is the lowest other rank, dies as well.
    resumed = {"RUN": "RESUME", "PIECES": "RESUME_PIECES", "COMMIT": "COMMIT"}
    for way, place in itertools.product(P2P, ("passes.staged", "passes.commit")):
        if not why_unmet(place, way, 0):
            goes_on = order("passes.resume", "kill", f"phase={resumed[way.phase]}")
            yield Case(way, "shrink", ((0, _visits(place, way)[0]), (1, goes_on)), (ON_ALL,))
    for second in (1, 2):
        for place in _JOINED:
            yield Case(P2P[0], "shrink", ((0, begun), (second, order(place))), (RESTARTED,))
        # What others may still write to is moved when one is frozen.
        yield Case(P2P[0], "shrink", ((0, order("passes.staged", "stop")), (second, order("memory.move"))), (ON_ALL,))


def _after_the_end() -> Iterator[Case]:
    for in_place, rank, place in itertools.product((True, False), range(NRANKS), _AFTER):
        yield Case(Way("grpc", LARGE, in_place), "shrink", ((rank, order(place)),), (ON_ALL,))


def _places_are_taken() -> Iterator[Case]:
    """Spares take the places of those that die. The first spare has the place `NRANKS` in the fleet."""
    for way, rank in itertools.product(GRPC, range(NRANKS)):
        for place in ("execute.begin", "execute.slice@skip=20", "execute.done"):
            yield Case(way, "restore", ((rank, order(place)),), (RESTARTED,))
        dies, other = (rank, order("execute.slice@skip=20")), (rank + 1) % NRANKS
        for place in (LOADING, *_JOINED):
            yield Case(way, "restore", (dies, (NRANKS, order(place))), (RESTARTED,))
        for place in _UNDONE + _JOINED:
            yield Case(way, "restore", (dies, (other, order(place))), (RESTARTED,))
        # While the spare loads, which takes half a second more then.
        yield Case(way, "restore", (dies, (NRANKS, order(LOADING, "delay"))), (RESTARTED,), kills=other)
    for way, rank, place in itertools.product(P2P, range(NRANKS), OF_OPERATIONS):
        if not why_unmet(place, way, rank):
            yield Case(way, "restore", ((rank, _visits(place, way)[-1]),), (_end(place, way, "restore"),))
    for way in P2P[:2]:
        dies = (0, order("execute.begin"))
        yield Case(way, "restore", (dies, (NRANKS, order(LOADING))), (RESTARTED,))
        yield Case(way, "restore", (dies, (NRANKS, order(LOADING, "delay"))), (RESTARTED,), kills=1)
    yield Case(GRPC[0], "restore", ((1, "execute.slice:stop@skip=20"),), (RESTARTED,))


def _checkpoints() -> Iterator[Case]:
    """Instead of the operation, a checkpoint is made, or restored (`Communicator.restore`)."""
    for rank, place in itertools.product(range(NRANKS), (*_SAVING, LOADING)):
        yield Case(Way("checkpoint", SMALL, True), "shrink", ((rank, order(place)),), (LOST,))


def _coordinator_dies() -> Iterator[Case]:
    for way, place in itertools.product(GRPC + P2P, OF_COORDINATOR):
        method = "method=Collective" if place.startswith("outcomes.") else ""
        unmet = why_coordinator_unmet(place, way)
        yield Case(way, "shrink", ((COORDINATOR, order(place, "kill", method)),), (ON_ALL,), unmet=unmet)


def _cannot_be() -> Iterator[Case]:
    """One case for each place and reason, at all ranks that it is true of."""
    for way, place in itertools.product(GRPC + P2P, OF_OPERATIONS):
        reasons = {rank: why_unmet(place, way, rank) for rank in range(NRANKS)}
        for reason in sorted({*reasons.values()} - {""}):
            faults = tuple((rank, order(place)) for rank, why in reasons.items() if why == reason)
            yield Case(way, "shrink", faults, (ON_ALL,), unmet=reason)
