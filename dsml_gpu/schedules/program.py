"""A schedule's part for one rank, which is what a device is given to execute."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import IntEnum

from dsml_gpu.schedules.collectives import COLLECTIVES
from dsml_gpu.schedules.schedule import Schedule
from dsml_gpu.schedules.verify import initial_contributions, promised_contributions, run_symbolically


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
        blocks: the schedule's numbers of the blocks that this rank has to do with, ascending.
        parts: chunks into which each block is cut. Moves count the chunks of these blocks only: chunk c is part
            ``c % parts`` of block ``blocks[c // parts]``.
        steps: moves of each step; steps in which the rank does nothing are left out.
        store_and_forward: a chunk is sent on only when all of it has arrived; otherwise slice by slice.
    """

    blocks: tuple[int, ...]
    parts: int
    steps: tuple[tuple[Move, ...], ...]
    store_and_forward: bool = False

    @property
    def nchunks(self) -> int:
        """Chunks of the rank's blocks together."""
        return len(self.blocks) * self.parts


def programs_of(schedule: Schedule) -> tuple[Program, ...]:
    """The programs of all ranks, in the order of ranks."""
    collective, roles, parts = COLLECTIVES[schedule.collective], schedule.roles, schedule.parts
    promised = [promised_contributions(collective, roles, block) for block in range(schedule.nblocks)]
    blocks = _blocks_by_rank(schedule)
    places = [{block: place for place, block in enumerate(of_rank)} for of_rank in blocks]

    def move(kind: Kind, rank: int, peer: int, chunk: int) -> Move:
        block, part = divmod(chunk, parts)
        return Move(kind, peer, places[rank][block] * parts + part)

    held = initial_contributions(schedule)
    steps: list[list[tuple[Move, ...]]] = [[] for _ in range(schedule.nranks)]
    for step in run_symbolically(schedule, held):
        moves: dict[int, list[Move]] = defaultdict(list)
        last_write = {(transfer.dst, transfer.chunk): transfer for transfer in step}
        for transfer in step:
            moves[transfer.src].append(move(Kind.SEND, transfer.src, transfer.dst, transfer.chunk))
        for transfer in step:
            kind = Kind.COPY
            if transfer.reduce:
                complete = held[transfer.dst][transfer.chunk] == promised[transfer.chunk // parts]
                last = last_write[transfer.dst, transfer.chunk] is transfer
                kind = Kind.REDUCE_LAST if complete and last else Kind.REDUCE
            moves[transfer.dst].append(move(kind, transfer.dst, transfer.src, transfer.chunk))
        for rank, rank_moves in moves.items():
            steps[rank].append(tuple(rank_moves))
    return tuple(
        Program(tuple(of_rank), parts, tuple(rank_steps), schedule.store_and_forward)
        for of_rank, rank_steps in zip(blocks, steps, strict=True)
    )


def _blocks_by_rank(schedule: Schedule) -> list[list[int]]:
    """The blocks that each rank sends, receives, or has and shall have, ascending."""
    collective, roles = COLLECTIVES[schedule.collective], schedule.roles
    blocks: list[set[int]] = [set() for _ in range(schedule.nranks)]
    for block in range(schedule.nblocks):
        for rank in set(collective.holders(roles, block)) & set(collective.takers(roles, block)):
            blocks[rank].add(block)
    for step in schedule.steps:
        for transfer in step:
            block = transfer.chunk // schedule.parts
            blocks[transfer.src].add(block)
            blocks[transfer.dst].add(block)
    return [sorted(of_rank) for of_rank in blocks]


def chunk_bounds(count: int, nchunks: int, chunk: int) -> tuple[int, int]:
    """First element of a chunk and one past its last, for a block of `count` elements cut into `nchunks`.

    The first ``count % nchunks`` chunks have one element more than the others; chunks may be empty.
    """
    quotient, remainder = divmod(count, nchunks)
    start = chunk * quotient + min(chunk, remainder)
    return start, start + quotient + (chunk < remainder)
