"""What each of a rank's moves must wait for, worked out once per program."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from dsml_gpu.schedules import Kind, Move, Program


@dataclass(frozen=True, slots=True)
class Access:
    """A move, and how many reads and writes of its chunk on this rank come before it.

    A send waits for the earlier writes, a receive for the earlier reads as well.
    """

    move: Move
    step: int
    reads_before: int
    writes_before: int


@dataclass(frozen=True, slots=True)
class Dataflow:
    """A program by peer and direction, each list in the order in which the stream to or from that peer carries it.

    Attributes:
        nblocks, parts: blocks of an operation, and chunks into which each is cut.
        reads, writes: how often each chunk is read and written in all, by chunk.
        reduces: it reduces something.
        store_and_forward: a chunk is sent on only when all of it has arrived.
    """

    nblocks: int
    parts: int
    sends: Mapping[int, tuple[Access, ...]]
    receives: Mapping[int, tuple[Access, ...]]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    reduces: bool
    store_and_forward: bool

    @property
    def nchunks(self) -> int:
        return self.nblocks * self.parts


def dataflow_of(program: Program) -> Dataflow:
    """The dataflow of a program."""
    reads = [0] * program.nchunks
    writes = [0] * program.nchunks
    sends: dict[int, list[Access]] = defaultdict(list)
    receives: dict[int, list[Access]] = defaultdict(list)
    for number, step in enumerate(program.steps):
        for move in step:
            access = Access(move, number, reads[move.chunk], writes[move.chunk])
            if move.kind is Kind.SEND:
                sends[move.peer].append(access)
                reads[move.chunk] += 1
            else:
                receives[move.peer].append(access)
                writes[move.chunk] += 1
    return Dataflow(
        len(program.blocks),
        program.parts,
        {peer: tuple(accesses) for peer, accesses in sends.items()},
        {peer: tuple(accesses) for peer, accesses in receives.items()},
        tuple(reads),
        tuple(writes),
        any(move.kind in (Kind.REDUCE, Kind.REDUCE_LAST) for step in program.steps for move in step),
        program.store_and_forward,
    )
