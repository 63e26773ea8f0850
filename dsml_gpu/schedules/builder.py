"""Schedules written chunk by chunk, in the order in which one thinks of them, as in msccl-tools' language.

Whoever writes a `Schedule` by hand decides in which step each transfer happens. A `Builder` decides that itself: one writes
what happens to each chunk, one operation after the other, and it finds the earliest step for each of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dsml_gpu.schedules.catalog import algorithms_of
from dsml_gpu.schedules.collectives import COLLECTIVES, Roles
from dsml_gpu.schedules.schedule import Schedule, Transfer
from dsml_gpu.schedules.steps import Steps

#: A chunk on a rank: (rank, chunk).
Place = tuple[int, int]


class StaleChunk(ValueError):
    """A handle was used whose chunk has been overwritten on that rank since; the message says by what, and where."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A handle on what one rank holds in one chunk, until that is overwritten. `Builder.chunk` gives the first ones.

    Attributes:
        rank: who holds it.
        index: which chunk.
    """

    rank: int
    index: int
    _builder: Builder = field(repr=False)
    _version: int = field(repr=False)
    _made_at: str = field(repr=False)

    def send(self, dst: int) -> Chunk:
        """Copies the chunk to rank `dst`, over what that holds.

        Returns:
            The handle on it there. This one remains good: the rank still holds what it has sent.

        Raises:
            StaleChunk: the chunk has been overwritten on this rank since the handle was made.
            ValueError: there is no such rank, or it is this one.
        """
        return self._builder._add(self, dst, reduce=False)

    def reduce(self, dst: int) -> Chunk:
        """Reduces the chunk into what rank `dst` holds of it.

        Returns:
            The handle on the result, which is there.

        Raises:
            StaleChunk, ValueError: as `send`.
        """
        return self._builder._add(self, dst, reduce=True)


class Builder:
    """Writes a schedule chunk by chunk.

    Operations mean what they would mean if they were executed one after the other, as written. `build` puts each into the
    earliest step that keeps this meaning, so that all that can happen at the same time does: it makes no difference whether
    one writes a ring step by step, or round for one chunk and then for the next.

    A ring all-reduce on 4 ranks, chunk by chunk:

    >>> from dsml_gpu.schedules import Builder
    >>> nranks = 4
    >>> b = Builder("all_reduce", "my_ring", nranks, parts=nranks)
    >>> for index in range(nranks):
    ...     c = b.chunk((index + 1) % nranks, index)  # what its right neighbour has of the rank's own chunk
    ...     for distance in range(2, nranks + 1):  # once round, collecting the contributions of all
    ...         c = c.reduce((index + distance) % nranks)
    ...     for distance in range(1, nranks):  # and round again, with the result
    ...         c = c.send((index + distance) % nranks)
    >>> b.build()
    Schedule(all_reduce my_ring, 4 ranks, 4 chunks, 6 steps, 24 transfers)

    To run it on devices, see `plugins`; to see it, `drawing`.

    What cannot be written is that two ranks exchange the same chunk in one step, as in recursive doubling: one of them comes
    first, and the other one then sends what it has got. The `Schedule` itself can say so.

    Args:
        collective: what it must compute, a key of `COLLECTIVES`.
        algorithm: its name, which must not be one of the package's own for this collective, nor "auto".
        nranks: number of ranks.
        parts: chunks into which each block is cut; chunk c is part ``c % parts`` of block ``c // parts``. An all-reduce has
            one block, so its chunks are its parts; of other collectives see `collectives`.
        root: of a rooted collective.
        pairs: the (src, dst) of a send/recv.
        store_and_forward: see `Schedule`.

    Raises:
        ValueError: on construction, where the collective is unknown or the name is taken.
    """

    def __init__(
        self,
        collective: str,
        algorithm: str,
        nranks: int,
        parts: int = 1,
        *,
        root: int = 0,
        pairs: tuple[tuple[int, int], ...] = (),
        store_and_forward: bool = False,
    ) -> None:
        if collective not in COLLECTIVES:
            raise ValueError(f"unknown collective {collective!r}; known: {', '.join(COLLECTIVES)}")
        if algorithm in ("", "auto", *algorithms_of(collective)):
            raise ValueError(f"the name {algorithm!r} of an algorithm of {collective} is taken")
        self._collective = COLLECTIVES[collective]
        self._algorithm = algorithm
        self._roles = Roles(nranks, root, pairs)
        self._parts = parts
        self._store_and_forward = store_and_forward
        #: Operations in the order written; between two lists stands a call of `step`.
        self._sections: list[list[Transfer]] = [[]]
        #: Of each chunk that was written: how often, and what wrote it last.
        self._writes: dict[Place, tuple[int, str]] = {}

    def chunk(self, rank: int, index: int) -> Chunk:
        """The handle on what a rank holds in a chunk now: at the start, or after the operations written so far.

        Raises:
            ValueError: there is no such rank or chunk, or the rank does not hold it.
        """
        nchunks = self._collective.nblocks(self._roles) * self._parts
        self._require_rank(rank)
        if not 0 <= index < nchunks:
            raise ValueError(f"chunk {index} is not one of {nchunks} chunks")
        version, _ = self._writes.get((rank, index), (0, ""))
        if not version and rank not in self._collective.holders(self._roles, index // self._parts):
            raise ValueError(f"rank {rank} does not hold chunk {index} of {self._collective.name} at the start, nor yet")
        return Chunk(rank, index, self, version, _line_outside())

    def step(self) -> None:
        """Begins a new step: all operations from here on come in later steps than all before."""
        self._sections.append([])

    def build(self) -> Schedule:
        """The schedule of the operations written so far, proved.

        Raises:
            InvalidSchedule: it does not compute the collective; the message names the first violated condition.
        """
        return Schedule(
            self._collective.name,
            self._algorithm,
            self._roles.nranks,
            self._parts,
            earliest_steps(self._sections),
            self._roles.root,
            self._roles.pairs,
            self._store_and_forward,
        )

    def _add(self, chunk: Chunk, dst: int, *, reduce: bool) -> Chunk:
        version, overwritten = self._writes.get((chunk.rank, chunk.index), (0, ""))
        if version != chunk._version:
            raise StaleChunk(
                f"this handle on chunk {chunk.index} of rank {chunk.rank}, made at {chunk._made_at}, is stale: {overwritten}"
            )
        self._require_rank(dst)
        if dst == chunk.rank:
            raise ValueError(f"rank {dst} cannot send chunk {chunk.index} to itself")
        here = _line_outside()
        self._sections[-1].append(Transfer(chunk.rank, dst, chunk.index, reduce))
        written = self._writes.get((dst, chunk.index), (0, ""))[0] + 1
        what = f"rank {chunk.rank} {'reduced into' if reduce else 'overwrote'} it at {here}"
        self._writes[dst, chunk.index] = written, what
        return Chunk(dst, chunk.index, self, written, here)

    def _require_rank(self, rank: int) -> None:
        if not 0 <= rank < self._roles.nranks:
            raise ValueError(f"rank {rank} is not one of {self._roles.nranks} ranks")


def earliest_steps(sections: Iterable[Iterable[Transfer]]) -> Steps:
    """Steps that do what the operations do one after the other, each as early as that allows.

    An operation comes after the last write of what it reads, not before the last read of what it writes (within a step
    reads come first), and after the last write of what it writes, or with it where both reduce. In a step operations keep
    their order. So each waits only for such as were written before it, also in the streams between ranks, which carry them
    in this very order: what is built here cannot deadlock.

    Args:
        sections: operations, in order; those of one section come in later steps than all of the one before.
    """
    steps: list[list[Transfer]] = []
    last_read: dict[Place, int] = {}
    last_write: dict[Place, int] = {}
    #: Where the last write was a copy, with which no other write may share the step.
    copied: set[Place] = set()
    for section in sections:
        first = len(steps)
        for transfer in section:
            source, target = (transfer.src, transfer.chunk), (transfer.dst, transfer.chunk)
            alone = target in copied or not transfer.reduce
            step = max(
                first,
                last_write.get(source, -1) + 1,
                last_read.get(target, 0),
                last_write.get(target, -1) + alone,
            )
            if step == len(steps):
                steps.append([])
            steps[step].append(transfer)
            last_read[source] = max(step, last_read.get(source, 0))
            last_write[target] = step
            (copied.discard if transfer.reduce else copied.add)(target)
    return tuple(map(tuple, steps))


def _line_outside() -> str:
    """The line of the user's program that is being executed, as ``file.py:12``."""
    frame = sys._getframe()
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
