"""The proof of a schedule: a symbolic run that carries, for each chunk on each rank, whose contributions it holds.

Three conditions, checked in this order:

1. Every transfer is well formed, and no contribution is reduced into a chunk twice.
2. At the end each chunk on each rank holds what the collective promises.
3. No deadlock. Between two ranks, chunks travel in one first-in-first-out stream. A receiver takes all of the next chunk
   when it has applied the one before, and applies it when its own reads of what it overwrites are over. The waits that
   follow from this must form no cycle; then some chunk can always be taken or applied, into however many slices chunks
   are cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
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
    held = initial_contributions(schedule)
    for _ in run_symbolically(schedule, held):
        pass
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


def initial_contributions(schedule: Schedule) -> list[list[Contributions]]:
    """What every rank holds in every chunk before the first step, ``[rank][chunk]``: its own."""
    return [[1 << rank] * schedule.nchunks for rank in range(schedule.nranks)]


def run_symbolically(schedule: Schedule, held: list[list[Contributions]]) -> Iterator[tuple[Transfer, ...]]:
    """Runs the schedule on `held`, in place; gives each step when it has been run.

    Raises:
        InvalidSchedule: a transfer is malformed or would reduce a contribution twice.
    """
    for number, step in enumerate(schedule.steps):
        for transfer in step:
            _check_form(schedule, number, transfer)
        incoming = [held[transfer.src][transfer.chunk] for transfer in step]  # as it was before the step
        written: dict[tuple[int, int], bool] = {}
        for transfer, contributions in zip(step, incoming, strict=True):
            target = (transfer.dst, transfer.chunk)
            if target in written and not (transfer.reduce and written[target]):
                raise InvalidSchedule(
                    f"{_where(schedule, number, transfer)}: another transfer of the same step writes this chunk of rank "
                    f"{transfer.dst}"
                )
            written[target] = transfer.reduce
            if transfer.reduce:
                already = held[transfer.dst][transfer.chunk]
                if contributions & already:
                    raise InvalidSchedule(
                        f"{_where(schedule, number, transfer)}: the contributions of {_ranks(contributions & already)} "
                        f"would be reduced twice"
                    )
                contributions |= already
            held[transfer.dst][transfer.chunk] = contributions
        yield step


def _where(schedule: Schedule, step: int, transfer: Transfer) -> str:
    return f"{schedule.algorithm}, step {step}, {transfer}"


def _check_form(schedule: Schedule, step: int, transfer: Transfer) -> None:
    for name, rank in (("src", transfer.src), ("dst", transfer.dst)):
        if not 0 <= rank < schedule.nranks:
            raise InvalidSchedule(f"{_where(schedule, step, transfer)}: {name} {rank} is not one of {schedule.nranks} ranks")
    if not 0 <= transfer.chunk < schedule.nchunks:
        raise InvalidSchedule(
            f"{_where(schedule, step, transfer)}: chunk {transfer.chunk} is not one of {schedule.nchunks} chunks"
        )
    if transfer.src == transfer.dst:
        raise InvalidSchedule(f"{_where(schedule, step, transfer)}: a rank does not send to itself")


def _check_progress(schedule: Schedule) -> None:
    """Raises InvalidSchedule where the waits of condition 3 form a cycle.

    Each transfer has two events: *taken* (the receiver has it off the stream, so the sender's read is over) and *applied*
    (it is in the receiver's chunk). Events are removed in topological order; what is left waits for itself.
    """
    waits: list[set[int]] = []  # by event: transfer i is taken in event 2i, applied in event 2i + 1
    last_in_stream: dict[tuple[int, int], int] = {}
    last_write: dict[tuple[int, int], int] = {}
    reads: dict[tuple[int, int], list[int]] = defaultdict(list)
    transfers = [transfer for step in schedule.steps for transfer in step]
    first = 0
    for step in schedule.steps:
        for index, transfer in enumerate(step, first):
            stream, source = (transfer.src, transfer.dst), (transfer.src, transfer.chunk)
            waits.append(
                {2 * other + 1 for other in (last_write.get(source), last_in_stream.get(stream)) if other is not None}
            )
            last_in_stream[stream] = index
            waits.append({2 * index})
            reads[source].append(index)
        for index, transfer in enumerate(step, first):
            target = (transfer.dst, transfer.chunk)
            waits[2 * index + 1].update(2 * read for read in reads[target])
            if target in last_write:
                waits[2 * index + 1].add(2 * last_write[target] + 1)
            last_write[target] = index
        first += len(step)
    waited_for_by: list[list[int]] = [[] for _ in waits]
    for event, needed in enumerate(waits):
        for other in needed:
            waited_for_by[other].append(event)
    missing = {event: len(needed) for event, needed in enumerate(waits)}
    ready = [event for event, count in missing.items() if count == 0]
    while ready:
        event = ready.pop()
        del missing[event]
        for other in waited_for_by[event]:
            missing[other] -= 1
            if missing[other] == 0:
                ready.append(other)
    if missing:
        stuck = transfers[min(missing) // 2]
        raise InvalidSchedule(f"{schedule.algorithm}: deadlock, {stuck} waits for itself")


def _ranks(contributions: Contributions) -> str:
    ranks = [rank for rank in range(contributions.bit_length()) if contributions >> rank & 1]
    return "no rank" if not ranks else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
