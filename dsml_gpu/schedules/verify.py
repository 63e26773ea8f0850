"""The proof of a schedule: a symbolic run that carries, for each chunk on each rank, whose contributions it holds.

Three conditions, checked in this order:

1. Every transfer is well formed, and no contribution is reduced into a chunk twice.
2. At the end each chunk on each rank holds what the collective promises.
3. No deadlock. Between two ranks, chunks travel in one first-in-first-out stream, a receiver takes the next chunk only when
   it has applied the one before, and it applies a chunk only when its own reads of what it overwrites are over. The
   waits that follow from this must form no cycle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsml_gpu.schedules.schedule import Schedule, Transfer


class InvalidSchedule(ValueError):
    """A schedule that would not compute its collective; the message names the first violated condition."""


#: Contributions as a bit set: bit r is set when rank r's input is in.
Contributions = int

#: collective -> (nranks, rank, chunk) -> what the chunk must hold on that rank at the end.
POSTCONDITIONS: dict[str, Callable[[int, int, int], Contributions]] = {
    "all_reduce": lambda nranks, rank, chunk: (1 << nranks) - 1,
}


def verify(schedule: Schedule) -> None:
    """Raises InvalidSchedule with the first violated condition."""
    if schedule.nranks < 1 or schedule.nchunks < 1:
        raise InvalidSchedule(f"at least 1 rank and 1 chunk are needed, not {schedule.nranks} and {schedule.nchunks}")
    if schedule.collective not in POSTCONDITIONS:
        raise InvalidSchedule(f"unknown collective {schedule.collective!r}; known: {', '.join(POSTCONDITIONS)}")
    held = run_symbolically(schedule)[-1]
    promised = POSTCONDITIONS[schedule.collective]
    for rank in range(schedule.nranks):
        for chunk in range(schedule.nchunks):
            expected, actual = promised(schedule.nranks, rank, chunk), held[rank][chunk]
            if actual != expected:
                raise InvalidSchedule(
                    f"{schedule.algorithm}: at the end rank {rank} holds the contributions of {_ranks(actual)} in chunk "
                    f"{chunk}; {schedule.collective} promises {_ranks(expected)}"
                )
    _check_progress(schedule)


def run_symbolically(schedule: Schedule) -> list[list[list[Contributions]]]:
    """What every rank holds in every chunk before the first step and after each: ``[step][rank][chunk]``.

    Raises:
        InvalidSchedule: a transfer is malformed or would reduce a contribution twice.
    """
    held = [[1 << rank] * schedule.nchunks for rank in range(schedule.nranks)]
    history = [held]
    for number, step in enumerate(schedule.steps):
        before, held = held, [list(chunks) for chunks in held]
        written: dict[tuple[int, int], bool] = {}
        for transfer in step:
            where = f"{schedule.algorithm}, step {number}, {transfer}"
            _check_form(schedule, transfer, where)
            target = (transfer.dst, transfer.chunk)
            if target in written and not (transfer.reduce and written[target]):
                raise InvalidSchedule(f"{where}: another transfer of the same step writes this chunk of rank {transfer.dst}")
            written[target] = transfer.reduce
            incoming = before[transfer.src][transfer.chunk]
            if transfer.reduce:
                twice = incoming & held[transfer.dst][transfer.chunk]
                if twice:
                    raise InvalidSchedule(f"{where}: the contributions of {_ranks(twice)} would be reduced twice")
                incoming |= held[transfer.dst][transfer.chunk]
            held[transfer.dst][transfer.chunk] = incoming
        history.append(held)
    return history


def _check_form(schedule: Schedule, transfer: Transfer, where: str) -> None:
    for name, rank in (("src", transfer.src), ("dst", transfer.dst)):
        if not 0 <= rank < schedule.nranks:
            raise InvalidSchedule(f"{where}: {name} {rank} is not one of {schedule.nranks} ranks")
    if not 0 <= transfer.chunk < schedule.nchunks:
        raise InvalidSchedule(f"{where}: chunk {transfer.chunk} is not one of {schedule.nchunks} chunks")
    if transfer.src == transfer.dst:
        raise InvalidSchedule(f"{where}: a rank does not send to itself")


def _check_progress(schedule: Schedule) -> None:
    """Raises InvalidSchedule where the waits of condition 3 form a cycle.

    Each transfer has two events: *taken* (the receiver has it off the stream, so the sender's read is over) and *applied*
    (it is in the receiver's chunk). Events are removed in topological order; what is left waits for itself.
    """
    waits: dict[tuple[str, int], set[tuple[str, int]]] = {}
    last_in_stream: dict[tuple[int, int], int] = {}
    writes: dict[tuple[int, int], list[int]] = defaultdict(list)
    reads: dict[tuple[int, int], list[int]] = defaultdict(list)
    transfers: list[Transfer] = []
    for step in schedule.steps:
        numbered = list(enumerate(step, start=len(transfers)))
        transfers += step
        for index, transfer in numbered:
            stream = (transfer.src, transfer.dst)
            taken = {("applied", write) for write in writes[transfer.src, transfer.chunk]}
            if stream in last_in_stream:
                taken.add(("applied", last_in_stream[stream]))
            last_in_stream[stream] = index
            waits["taken", index] = taken
        for index, transfer in numbered:
            reads[transfer.src, transfer.chunk].append(index)
        for index, transfer in numbered:
            target = (transfer.dst, transfer.chunk)
            waits["applied", index] = {("taken", index)}
            waits["applied", index] |= {("taken", read) for read in reads[target]}
            waits["applied", index] |= {("applied", write) for write in writes[target]}
            writes[target].append(index)
    waiting_for: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
    for event, needed in waits.items():
        for other in needed:
            waiting_for[other].append(event)
    missing = {event: len(needed) for event, needed in waits.items()}
    ready = [event for event, count in missing.items() if count == 0]
    while ready:
        event = ready.pop()
        del missing[event]
        for other in waiting_for[event]:
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    if missing:
        stuck = transfers[min(index for _, index in missing)]
        raise InvalidSchedule(f"{schedule.algorithm}: deadlock, {stuck} waits for itself")


def _ranks(contributions: Contributions) -> str:
    ranks = [rank for rank in range(contributions.bit_length()) if contributions >> rank & 1]
    return "no rank" if not ranks else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
