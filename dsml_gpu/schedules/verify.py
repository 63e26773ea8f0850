"""The proof of a schedule: a symbolic run that carries, for each chunk on each rank, whose contributions it holds.

Three conditions, checked in this order:

1. Every transfer is well formed and sends what its source holds, and no contribution is reduced into a chunk twice.
2. At the end the ranks that the collective promises its result to (`collectives`) hold it, in every chunk.
3. No deadlock. Between two ranks, chunks travel in one first-in-first-out stream. A receiver takes all of the next chunk
   when it has applied the one before, and applies it when its own reads of what it overwrites are over. The waits that
   follow from this must form no cycle; then some chunk can always be taken or applied, into however many slices chunks
   are cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from dsml_gpu.schedules.collectives import COLLECTIVES, Collective, Layout, Roles

if TYPE_CHECKING:
    from dsml_gpu.schedules.schedule import Schedule, Transfer


class InvalidSchedule(ValueError):
    """A schedule that would not compute its collective; the message names the first violated condition."""


#: Contributions as a bit set: bit r is set when what rank r held at the start is in.
Contributions = int
#: What one rank holds: chunk -> contributions. A chunk that it does not hold is absent.
Held = dict[int, Contributions]


def verify(schedule: Schedule) -> None:
    """Raises InvalidSchedule with the first violated condition."""
    _check_header(schedule)
    held = initial_contributions(schedule)
    for _ in run_symbolically(schedule, held):
        pass
    collective = COLLECTIVES[schedule.collective]
    for block in range(schedule.nblocks):
        expected = promised_contributions(collective, schedule.roles, block)
        for rank in collective.takers(schedule.roles, block):
            for chunk in range(block * schedule.parts, (block + 1) * schedule.parts):
                actual = held[rank].get(chunk, 0)
                if actual != expected:
                    raise InvalidSchedule(
                        f"{schedule.algorithm}: at the end rank {rank} holds the contributions of {_ranks(actual)} in "
                        f"chunk {chunk}; {schedule.collective} promises {_ranks(expected)}"
                    )
    _check_progress(schedule)


def initial_contributions(schedule: Schedule) -> list[Held]:
    """What every rank holds before the first step, by rank: its own contribution to each chunk of the blocks it has."""
    collective = COLLECTIVES[schedule.collective]
    held: list[Held] = [{} for _ in range(schedule.nranks)]
    for block in range(schedule.nblocks):
        for rank in collective.holders(schedule.roles, block):
            for chunk in range(block * schedule.parts, (block + 1) * schedule.parts):
                held[rank][chunk] = 1 << rank
    return held


def promised_contributions(collective: Collective, roles: Roles, block: int) -> Contributions:
    """What the result holds in every chunk of a block."""
    return sum(1 << rank for rank in collective.holders(roles, block))


def run_symbolically(schedule: Schedule, held: list[Held]) -> Iterator[tuple[Transfer, ...]]:
    """Runs the schedule on `held`, in place; gives each step when it has been run.

    Raises:
        InvalidSchedule: a transfer is malformed, sends what its source does not hold, or would reduce a contribution twice.
    """
    collective = COLLECTIVES[schedule.collective]
    nchunks = schedule.nchunks
    for number, step in enumerate(schedule.steps):
        for transfer in step:
            _check_form(schedule, nchunks, number, transfer)
        incoming = [held[transfer.src].get(transfer.chunk, 0) for transfer in step]  # as it was before the step
        written: dict[tuple[int, int], bool] = {}
        for transfer, contributions in zip(step, incoming, strict=True):
            if not contributions:
                raise InvalidSchedule(
                    f"{_where(schedule, number, transfer)}: rank {transfer.src} does not hold chunk {transfer.chunk} yet"
                )
            target = (transfer.dst, transfer.chunk)
            if target in written and not (transfer.reduce and written[target]):
                raise InvalidSchedule(
                    f"{_where(schedule, number, transfer)}: another transfer of the same step writes this chunk of rank "
                    f"{transfer.dst}"
                )
            written[target] = transfer.reduce
            if transfer.reduce:
                contributions |= _reduced_into(schedule, collective, number, transfer, contributions, held)
            held[transfer.dst][transfer.chunk] = contributions
        yield step


def _reduced_into(
    schedule: Schedule,
    collective: Collective,
    step: int,
    transfer: Transfer,
    contributions: Contributions,
    held: list[Held],
) -> Contributions:
    """What the transfer's target holds, into which `contributions` may be reduced."""
    if not collective.reduces:
        raise InvalidSchedule(f"{_where(schedule, step, transfer)}: {collective.name} does not reduce")
    already = held[transfer.dst].get(transfer.chunk, 0)
    if contributions & already and not collective.idempotent:
        raise InvalidSchedule(
            f"{_where(schedule, step, transfer)}: the contributions of {_ranks(contributions & already)} would be reduced "
            f"twice"
        )
    return already


def _where(schedule: Schedule, step: int, transfer: Transfer) -> str:
    return f"{schedule.algorithm}, step {step}, {transfer}"


def _check_header(schedule: Schedule) -> None:
    if schedule.nranks < 1 or schedule.parts < 1:
        raise InvalidSchedule(f"at least 1 rank and 1 part are needed, not {schedule.nranks} and {schedule.parts}")
    collective = COLLECTIVES.get(schedule.collective)
    if collective is None:
        raise InvalidSchedule(f"unknown collective {schedule.collective!r}; known: {', '.join(COLLECTIVES)}")
    if not 0 <= schedule.root < schedule.nranks:
        raise InvalidSchedule(f"root {schedule.root} is not one of {schedule.nranks} ranks")
    if schedule.root and not collective.rooted:
        raise InvalidSchedule(f"{collective.name} has no root, but root {schedule.root} was given")
    if schedule.pairs and collective.layout is not Layout.LISTED:
        raise InvalidSchedule(f"{collective.name} has no pairs, but {len(schedule.pairs)} were given")
    for pair in schedule.pairs:
        for rank in pair:
            if not 0 <= rank < schedule.nranks:
                raise InvalidSchedule(f"rank {rank} of the pair {pair} is not one of {schedule.nranks} ranks")


def _check_form(schedule: Schedule, nchunks: int, step: int, transfer: Transfer) -> None:
    for name, rank in (("src", transfer.src), ("dst", transfer.dst)):
        if not 0 <= rank < schedule.nranks:
            raise InvalidSchedule(f"{_where(schedule, step, transfer)}: {name} {rank} is not one of {schedule.nranks} ranks")
    if not 0 <= transfer.chunk < nchunks:
        raise InvalidSchedule(f"{_where(schedule, step, transfer)}: chunk {transfer.chunk} is not one of {nchunks} chunks")
    if transfer.src == transfer.dst:
        raise InvalidSchedule(f"{_where(schedule, step, transfer)}: a rank does not send to itself")


def _check_progress(schedule: Schedule) -> None:
    """Raises InvalidSchedule where the waits of condition 3 form a cycle.

    Each transfer has two events: *taken* (the receiver has it off the stream, so the sender's read is over) and *applied*
    (it is in the receiver's chunk). They wait for events of transfers before it in the list, except that applying also
    waits until all reads of the same step are over. So no cycle leaves a step, and a step in which nothing is read after
    the transfer that overwrites it has none.
    """
    for step in schedule.steps:
        last_read = {(transfer.src, transfer.chunk): index for index, transfer in enumerate(step)}
        if any(last_read.get((transfer.dst, transfer.chunk), -1) > index for index, transfer in enumerate(step)):
            _check_progress_within(schedule, step)


def _check_progress_within(schedule: Schedule, step: tuple[Transfer, ...]) -> None:
    """The same for one step, when all before it is done. Transfer i is taken in event 2i, applied in event 2i + 1."""
    last_in_stream: dict[tuple[int, int], int] = {}
    last_write: dict[tuple[int, int], int] = {}
    reads: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, transfer in enumerate(step):
        reads[transfer.src, transfer.chunk].append(index)
    waits: dict[int, set[int]] = {}
    for index, transfer in enumerate(step):
        stream, target = (transfer.src, transfer.dst), (transfer.dst, transfer.chunk)
        waits[2 * index] = {2 * last_in_stream[stream] + 1} if stream in last_in_stream else set()
        waits[2 * index + 1] = {2 * index}
        if target in last_write:  # which has waited for the reads
            waits[2 * index + 1].add(2 * last_write[target] + 1)
        else:
            waits[2 * index + 1].update(2 * read for read in reads[target])
        last_in_stream[stream] = last_write[target] = index
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        first, *others = dict.fromkeys(event // 2 for event in error.args[1])
        raise InvalidSchedule(
            f"{schedule.algorithm}: deadlock, {step[first]} waits for itself, by way of "
            f"{', '.join(str(step[index]) for index in others)}"
        ) from None


def _ranks(contributions: Contributions) -> str:
    ranks = [rank for rank in range(contributions.bit_length()) if contributions >> rank & 1]
    return "no rank" if not ranks else f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
