"""A schedule's part for one rank, which is what a device is given to execute."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.verify import POSTCONDITIONS, initial_contributions, run_symbolically


class Kind(IntEnum):
    """What one rank does with one chunk; numbers as ``Move.Kind`` on the wire."""

    SEND = 1
    COPY = 2
    REDUCE = 3
    #: The reduction that completes the chunk, where an average is divided.
    REDUCE_LAST = 4


@dataclass(frozen=True, slots=True)
class Move:
    """One rank's part in one transfer."""

    kind: Kind
    peer: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Program:
    """One rank's moves, step by step; in each step sends come before receives.

    Attributes:
        nchunks: parts into which the buffer is cut.
        steps: moves of each step; steps in which the rank does nothing are left out.
    """

    nchunks: int
    steps: tuple[tuple[Move, ...], ...]


@lru_cache(maxsize=256)
def programs_of(schedule: Schedule) -> tuple[Program, ...]:
    """The programs of all ranks, in the order of ranks."""
    held = initial_contributions(schedule)
    promised = POSTCONDITIONS[schedule.collective]
    steps: list[list[tuple[Move, ...]]] = [[] for _ in range(schedule.nranks)]
    for step in run_symbolically(schedule, held):
        moves: dict[int, list[Move]] = defaultdict(list)
        last_write = {(transfer.dst, transfer.chunk): transfer for transfer in step}
        for transfer in step:
            moves[transfer.src].append(Move(Kind.SEND, transfer.dst, transfer.chunk))
        for transfer in step:
            target = (transfer.dst, transfer.chunk)
            complete = held[transfer.dst][transfer.chunk] == promised(schedule.nranks, *target)
            kind = Kind.COPY
            if transfer.reduce:
                kind = Kind.REDUCE_LAST if complete and last_write[target] is transfer else Kind.REDUCE
            moves[transfer.dst].append(Move(kind, transfer.src, transfer.chunk))
        for rank, rank_moves in moves.items():
            steps[rank].append(tuple(rank_moves))
    return tuple(Program(schedule.nchunks, tuple(rank_steps)) for rank_steps in steps)


def chunk_bounds(count: int, nchunks: int, chunk: int) -> tuple[int, int]:
    """First element of a chunk and one past its last, for a buffer of `count` elements cut into `nchunks`.

    The first ``count % nchunks`` chunks have one element more than the others; chunks may be empty.
    """
    quotient, remainder = divmod(count, nchunks)
    start = chunk * quotient + min(chunk, remainder)
    return start, start + quotient + (chunk < remainder)
