"""Who holds an operation up: from what each rank waits for to the one that all of them wait for in the end, in words.

Steps and operations are numbered as in `pb.Wait`. The operations of a round run in order on each rank, and so do the steps
of an operation, as far as they concern the same chunk: what a rank waits for can explain that others do not get what comes
later from it, but not that they do not have what should have come before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from dsml_gpu.errors import OperationTimeout, PeerUnavailable
from dsml_gpu.schedules import Schedule
from dsml_gpu.wire import gpu_sim_pb2 as pb

#: What each rank that answered waits for; ranks that wait for nothing have an empty one.
WaitsByRank = Mapping[int, Sequence[pb.Wait]]


@dataclass(frozen=True, slots=True)
class Subject:
    """Which operation.

    Attributes:
        name: of the collective.
        first, last: its number in its communicator, from 1; where several small ones travel as one, theirs.
        nbytes: its size.
        epoch: the communicator's when it ran.
    """

    name: str
    first: int
    last: int
    algorithm: str
    nbytes: int
    epoch: int

    def __str__(self) -> str:
        numbers = f"#{self.first}" if self.first == self.last else f"#{self.first} to #{self.last}"
        return f"{self.name} {numbers} ({self.algorithm}, {_size(self.nbytes)}, epoch {self.epoch})"


class HeldUp(OperationTimeout):
    """An operation that one rank held up; the message says all of it (see `message`).

    Args:
        rank: who is to blame; None: nobody.
        why: to follow on its name.
        waited_ms: how long others had waited for it.
        is_silent: it did not answer when it was asked.
    """

    def __init__(self, text: str, rank: int | None, why: str, waited_ms: int, *, is_silent: bool) -> None:
        super().__init__(text)
        self.rank = rank
        self.why = why
        self.waited_ms = waited_ms
        self.is_silent = is_silent


class HeldUpByLost(PeerUnavailable):
    """The same, where the rank is lost and the communicator does not go on without it."""


class _Edge(NamedTuple):
    """A rank waits for another one."""

    rank: int
    wait: pb.Wait

    @property
    def place(self) -> tuple[int, float]:
        """How far its rank has come: the operation, and the step where that is known."""
        known = self.wait.steps and not self.wait.sends
        return self.wait.operation, self.wait.step if known else float("inf")


def blamed(waits: WaitsByRank, silent: Set[int] = frozenset()) -> int | None:
    """The rank at the root of all waits; None where nobody waits and all have answered.

    A rank that did not answer is to blame before any other. Of the others one is that somebody waits for, and whose own
    waits do not explain it. Where these are several, it is the one that most ranks wait for, then the highest.

    Args:
        silent: ranks that did not answer; so are those that are waited for and have no entry in `waits`.
    """
    edges = list(_edges(waits))
    suspects = {*silent, *(edge.wait.rank for edge in edges if edge.wait.rank not in waits)}
    if not suspects:
        suspects = {edge.wait.rank for edge in edges if not _explained(edge, waits)}
    if not suspects:  # they all explain each other
        suspects = {edge.wait.rank for edge in edges}
    return max(suspects, key=lambda rank: (sum(edge.wait.rank == rank for edge in edges), rank), default=None)


def waiting_for(rank: int, waits: WaitsByRank) -> list[int]:
    """The ranks that wait for one, or for others that do, ascending; without itself."""
    found = {rank}
    before = 0
    while before < len(found):
        before = len(found)
        found |= {edge.rank for edge in _edges(waits) if edge.wait.rank in found}
    return sorted(found - {rank})


def longest_ms(rank: int, waits: WaitsByRank) -> int:
    """How long a rank has been waited for; 0: it was not."""
    return max((edge.wait.waitedMs for edge in _edges(waits) if edge.wait.rank == rank), default=0)


def held_up_operation(rank: int | None, waits: WaitsByRank) -> int:
    """Index of the operation that a rank holds up; without one, or where nobody waits for it, the first that is not over."""
    edges = list(_edges(waits))
    here = [edge for edge in edges if edge.wait.rank == rank] or edges
    return min((edge.wait.operation for edge in here), default=0)


def failing(rank: int, waits: WaitsByRank) -> str:
    """What a rank has not done, to follow on its name.

    For example "has not sent chunk 1 of step 3/6 for 2.1 s; ranks 0, 1, 3 wait for it".
    """
    here = [edge for edge in _edges(waits) if edge.wait.rank == rank]
    if not here:
        return "does not answer"
    root = min(here, key=lambda edge: (edge.place, -edge.wait.waitedMs))
    wait = root.wait
    if wait.sends:
        missing = f"has not taken what rank {root.rank} sends"
    elif wait.steps:
        missing = f"has not sent chunk {wait.chunk} of step {wait.step + 1}/{wait.steps}"
    else:
        missing = f"has not come to the end of what it sends to rank {root.rank}"
    others = waiting_for(rank, waits)
    verb = "ranks {} wait" if len(others) > 1 else "rank {} waits"
    return f"{missing} for {wait.waitedMs / 1000:.1f} s; {verb.format(', '.join(map(str, others)))} for it"


def message(subject: Subject, waits: WaitsByRank, silent: Set[int], names: Sequence[str], error: str) -> str:
    """What a client is told.

    For example "all_reduce #17 (ring, 64 MiB, epoch 3): rank 2 (device 7 at 10.0.0.5:50051) has not sent chunk 1 of step 3/6
    for 2.1 s; ranks 0, 1, 3 wait for it".

    Args:
        silent: as in `blamed`.
        names: of the devices, by rank.
        error: what is said where nobody is to blame.
    """
    rank = blamed(waits, silent)
    if rank is None:
        return f"{subject}: {error}"
    return f"{subject}: rank {rank} ({names[rank]}) {failing(rank, waits)}"


def in_schedule(wait: pb.Wait, rank: int, schedule: Schedule, blocks: Sequence[int]) -> pb.Wait:
    """A wait in the numbers of the schedule. A rank's own program counts its own blocks, and the steps it takes part in.

    Args:
        rank: who waits.
        blocks: of its program.
    """
    if not wait.steps:
        return wait
    steps = [number for number, step in enumerate(schedule.steps) if any(rank in (one.src, one.dst) for one in step)]
    block, part = divmod(wait.chunk, schedule.parts)
    seen = pb.Wait()
    seen.CopyFrom(wait)
    seen.chunk = blocks[block] * schedule.parts + part
    seen.step, seen.steps = steps[wait.step], len(schedule.steps)
    return seen


def _edges(waits: WaitsByRank) -> Iterator[_Edge]:
    for rank, some in waits.items():
        for wait in some:
            yield _Edge(rank, wait)


def _explained(edge: _Edge, waits: WaitsByRank) -> bool:
    """Whether the rank that is waited for waits itself, for something that comes before what it should have done."""
    return any(_Edge(edge.wait.rank, wait).place < edge.place for wait in waits.get(edge.wait.rank, ()))


def _size(nbytes: int) -> str:
    for power, prefix in ((3, "G"), (2, "M"), (1, "K")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.4g} {prefix}iB"
    return f"{nbytes} B"
